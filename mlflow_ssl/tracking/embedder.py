"""A registered network as what it is for: pictures in, embeddings out.

Only networks of this project are opened: a TorchScript file and a transform in plain words, of which nothing is
unpickled. What another model gives is for the MLflow evaluator.
"""

import copy
import hashlib
import math
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
from mlflow_ssl.export import load_torchscript
from mlflow_ssl.tracking.opening import check_answers

NETWORK = Path("data", "model.pth")


@dataclass(frozen=True)
class Embedder:
    """A network and its preprocessing.

    Attributes:
        uri: where it is registered; an alias or a stage is resolved to the version.
        digest: of the network and its transform, 32 hexadecimal digits.
        embedding_size: numbers of an embedding, D.
        transform: of albumentations, its random state its own; None where there is none.
        network: TorchScript, on `device`.
        device: where it runs.
    """

    uri: str
    digest: str
    embedding_size: int
    transform: Any
    network: Any = field(repr=False)
    device: torch.device

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Return the embeddings ``(B, D)``, float32 on the host, of transformed images ``(B, 3, H, W)``."""
        images = images.to(self.device, non_blocking=True)
        unit = images * self.network.std + self.network.mean  # it normalizes itself
        embeddings: Tensor = self.network(unit)
        return embeddings.float().cpu()

    @torch.no_grad()
    def untrained(self, *, seed: int = 0) -> "Embedder":
        """Return the same network with weights drawn anew: what its shape alone is worth.

        Matrices and kernels are He et al.'s, arXiv:1502.01852, eq. 10; scales are 1, shifts 0, and normalizations have
        seen nothing.
        """
        network = copy.deepcopy(self.network)
        generator = torch.Generator().manual_seed(seed)
        for name, values in network.backbone.state_dict().items():
            values.copy_(_drawn(name, values, generator))
        return replace(self, uri="untrained", digest="", network=network)


def _drawn(name: str, values: Tensor, generator: torch.Generator) -> Tensor:
    if not values.is_floating_point():  # counters
        return torch.zeros_like(values)
    if values.ndim > 1:
        fan_in = max(values[0].numel(), 1)
        drawn: Tensor = torch.randn(values.shape, generator=generator) * math.sqrt(2 / fan_in)
        return drawn
    scale = name.endswith(("weight", "running_var", "gamma"))
    return torch.ones_like(values) if scale else torch.zeros_like(values)


def open_embedder(model_uri: str, *, device: str = "auto") -> Embedder:
    """Load a network that was registered by this project.

    Args:
        model_uri: as MLflow has it: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``runs:/...`` or a folder.
        device: ``auto`` takes a GPU where there is one.

    Raises:
        InputError: if there is no such model, it is not one of ours, or there is no such device.
    """
    uri = resolved(model_uri)
    folder = _download(uri)
    try:
        description = Model.load(folder)
        card, config = description.metadata or {}, description.flavors["python_function"]["config"]
        size, transform = int(card["embedding_size"]), config["transform"]
        network = load_torchscript(folder / NETWORK)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, MlflowException) as error:
        raise InputError(f"model_uri must be a network that this project registered, got {model_uri}") from error
    place = _device(device)
    digest = hashlib.blake2b((folder / NETWORK).read_bytes(), digest_size=16)
    digest.update(repr(transform).encode())
    return Embedder(uri, digest.hexdigest(), size, _built(transform), network.to(place).eval(), place)


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


def _download(uri: str) -> Path:
    if "://" not in uri and ":/" not in uri and not Path(uri).is_dir():
        raise InputError(f"model_uri must be a registered model or a folder, got {uri}")
    if ":/" in uri:
        check_answers(mlflow.get_tracking_uri())
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
