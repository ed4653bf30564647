"""The exported network in MLflow's model registry."""

import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from packaging.version import Version

from mlflow_ssl.errors import InputError
from mlflow_ssl.export import DeploymentNetwork, ModelCard, load_torchscript, traced

log = logging.getLogger(__name__)


def register_network(
    network: DeploymentNetwork, *, card: ModelCard, name: str, example: npt.NDArray[np.float32], tags: Mapping[str, str]
) -> str:
    """Log a network as a TorchScript model of the active run, register it, and return its version.

    Args:
        network: normalization and backbone.
        card: what it takes and gives.
        name: registered name; made if new.
        example: input example, ``(1, 3, H, W)`` in [0, 1].
        tags: of the version and of the logged model.
    """
    began = time.monotonic()
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 3, *card.input_size))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, card.embedding_size))]),
    )
    with _without_advice():
        info = mlflow.pytorch.log_model(
            traced(network, torch.from_numpy(example).repeat(2, 1, 1, 1)),
            name="model",
            signature=signature,
            input_example=example,
            pip_requirements=requirements(),
            metadata=dataclasses.asdict(card),
            # of a TorchScript network this writes the plain archive, which loads without unpickling
            serialization_format="pickle",
        )
    mlflow.set_logged_model_tags(info.model_id, dict(tags))
    registered = mlflow.register_model(f"models:/{info.model_id}", name, tags=dict(tags))
    log.info("registered %s version %s in %.1f s", name, registered.version, time.monotonic() - began)
    return str(registered.version)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Silence what MLflow says about pickles, of which there is none here, and about the environment."""
    loggers = [logging.getLogger(name) for name in ("mlflow.pytorch", "mlflow.utils.environment")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*(torch\.jit\.load|TorchScript archive)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def requirements() -> list[str]:
    """Return what serving the network needs, pinned to public versions (a local one like ``+cpu`` is not to be had)."""
    return [f"{name}=={Version(version(name)).public}" for name in ("mlflow", "torch", "numpy")]


def load_backbone_weights(model_uri: str) -> dict[str, torch.Tensor]:
    """Return the backbone's state dict of a network that `register_network` registered.

    Raises:
        InputError: if there is no such model, or it is not one of ours.
    """
    try:
        folder = Path(mlflow.artifacts.download_artifacts(model_uri))
    except MlflowException as error:
        raise InputError(f"backbone.checkpoint_path: no registered model at {model_uri}: {error.message}") from error
    file = folder / "data" / "model.pth"
    try:
        network: Any = load_torchscript(file)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"backbone.checkpoint_path: {model_uri} is not a TorchScript network") from error
    prefix = "backbone."
    return {key.removeprefix(prefix): value for key, value in network.state_dict().items() if key.startswith(prefix)}
