"""A registered network as what it is for: pictures in, embeddings out.

A network of this project is a TorchScript file and a transform in plain words, of which nothing is unpickled. Those of
others are for `mlflow_ssl.tracking.foreign`, and opened only where the user trusts them.
"""

import hashlib
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from torch import Tensor

from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation.untrained import untrained_copy
from mlflow_ssl.export import load_torchscript
from mlflow_ssl.tracking.foreign import open_foreign
from mlflow_ssl.tracking.opening import check_answers
from mlflow_ssl.tracking.preprocessing import Preprocessing

log = logging.getLogger(__name__)

NETWORK = Path("data", "model.pth")


@dataclass(frozen=True)
class Embedder:
    """A network and its preprocessing.

    Attributes:
        uri: where it is registered; an alias or a stage is resolved to the version.
        digest: of the network and its transform, 32 hexadecimal digits.
        embedding_size: numbers of an embedding, D.
        transform: of albumentations, its random state its own; None where there is none.
        network: TorchScript, or a network of others, on `device`.
        device: where it runs.
        preprocessing: of a network of others; None for ours, which brings its own.
    """

    uri: str
    digest: str
    embedding_size: int
    transform: Any
    network: Any = field(repr=False)
    device: torch.device
    preprocessing: Preprocessing | None = None

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Return the embeddings ``(B, D)``, float32 on the host, of transformed images ``(B, 3, H, W)``."""
        # they are normalized already, and of a classifier the embeddings are asked for
        embeddings: Tensor = self.network.backbone(images.to(self.device, non_blocking=True))
        return embeddings.float().cpu()

    def untrained(self, *, seed: int = 0) -> "Embedder | None":
        """Return the same network with weights drawn anew: what its shape alone is worth.

        Returns:
            None where there are no weights to draw: of a service, or of what cannot be copied.
        """
        if next(self.network.parameters(), None) is None:
            return None
        try:
            network = untrained_copy(self.network, seed=seed)
        except Exception as error:  # a module of others may refuse to be copied in any way
            log.debug("no untrained network: %s", error)
            return None
        return replace(self, uri="untrained", digest="", network=network)


def open_embedder(
    model_uri: str, *, device: str = "auto", said: Preprocessing | None = None, trusted: bool = False
) -> Embedder:
    """Load a network, of this project or, where that is trusted, of others.

    Args:
        model_uri: as MLflow has it: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``runs:/...`` or a folder.
        device: ``auto`` takes a GPU where there is one.
        said: what the user says of images that a network of others takes.
        trusted: whether to load a network of others, which runs its code.

    Raises:
        InputError: if there is no such model, it is not one of ours and not trusted, or there is no such device.
    """
    uri = resolved(model_uri)
    folder = _download(uri)
    place = _device(device)
    try:
        description = Model.load(folder)
    except (MlflowException, OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"model_uri must be an MLflow model, got {model_uri}, which has no MLmodel to read") from error
    ours = _open_ours(folder, description, uri, place)
    if ours is not None:
        return ours
    foreign = open_foreign(folder, description, uri, said=said or Preprocessing(), trusted=trusted, device=place)
    return Embedder(
        uri,
        foreign.digest,
        foreign.embedding_size,
        foreign.transform,
        foreign.network,
        place,
        foreign.preprocessing,
    )


def _open_ours(folder: Path, description: Model, uri: str, device: torch.device) -> Embedder | None:
    """Return a network that this project registered; None for another."""
    try:
        card, config = description.metadata or {}, description.flavors["python_function"]["config"]
        size, transform = int(card["embedding_size"]), config["transform"]
        network = load_torchscript(folder / NETWORK)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError):
        return None
    digest = hashlib.blake2b((folder / NETWORK).read_bytes(), digest_size=16)
    digest.update(repr(transform).encode())
    return Embedder(uri, digest.hexdigest(), size, _built(transform), network.to(device).eval(), device)


def resolved(model_uri: str) -> str:
    """Return the URI of the very version that an alias means now: it may mean another tomorrow.

    Raises:
        InputError: if there is no such model.
    """
    name, at, alias = model_uri.removeprefix("models:/").partition("@")
    if not model_uri.startswith("models:/") or not at:
        return model_uri
    check_answers(mlflow.get_tracking_uri())
    try:
        return f"models:/{name}/{MlflowClient().get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        raise InputError(f"model_uri: there is no model at {model_uri}: {error.message}") from error


def check_model_uri(uri: str) -> None:
    """Check that a URI may be a model's, and that somebody is there to ask.

    Raises:
        InputError: if not.
    """
    if "://" not in uri and ":/" not in uri and not Path(uri).is_dir():
        raise InputError(f"model_uri must be a registered model or a folder, got {uri}")
    if ":/" in uri:
        check_answers(mlflow.get_tracking_uri())


def _download(uri: str) -> Path:
    check_model_uri(uri)
    try:
        return Path(mlflow.artifacts.download_artifacts(uri))
    except (MlflowException, OSError) as error:
        raise InputError(f"model_uri: there is no model at {uri}: {getattr(error, 'message', error)}") from error


def _built(transform: Any) -> Any:
    if transform is None:
        return None
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations.from_dict(transform)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device must be auto or one that is here, got {name!r}") from error
