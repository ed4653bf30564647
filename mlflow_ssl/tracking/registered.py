"""What is known of a registered network before it is loaded."""

import logging
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from mlflow_ssl.backbones import read_call
from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.embedder import check_model_uri, resolved
from mlflow_ssl.tracking.opening import connect
from mlflow_ssl.tracking.report import logged_model_id

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegisteredNetwork:
    """A network of this project as the registry describes it.

    Attributes:
        uri: of the very version; an alias is resolved.
        name: registered name; that of the backbone where it is not from the registry.
        model_id: of its logged model; None where there is none.
        backbone: timm's name.
        small_stem: whether its stem is the one for small images.
        input_height: pixels.
        input_width: pixels.
        mean: that images are normalized by, of each channel.
        std: likewise.
    """

    uri: str
    name: str
    model_id: str | None
    backbone: str
    small_stem: bool
    input_height: int
    input_width: int
    mean: list[float]
    std: list[float]


def find_registered(model_uri: str, *, tracking_uri: str | None = None) -> RegisteredNetwork:
    """Look up a network that was registered by this project. Its weights are not fetched, and nothing is unpickled.

    Args:
        model_uri: as MLflow has it: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``runs:/...`` or a folder.
        tracking_uri: of the store; None for MLflow's own.

    Raises:
        InputError: if the store does not answer, there is no such model, or it is not one of ours.
    """
    if tracking_uri is not None:
        connect(tracking_uri)
    uri = resolved(model_uri)
    check_model_uri(uri)
    try:
        card: dict[str, Any] = Model.load(uri).metadata or {}
    except (MlflowException, OSError) as error:
        raise InputError(f"model_uri: there is no model at {uri}: {getattr(error, 'message', error)}") from error
    try:
        made = read_call(card["state_dict_fits"])
        height, width = map(int, card["input_size"])
        mean, std = (list(map(float, card[name])) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"model_uri must be a network that this project registered, got {model_uri}") from error
    backbone, small_stem = str(made.pop("model_name")), bool(made.pop("small_stem"))
    if made:  # of other people's cards no argument is handed on
        words = " ".join(f"+backbone.{name}={value}" for name, value in made.items())
        log.warning("the backbone of %s was made with further arguments; to have them again add %s", uri, words)
    return RegisteredNetwork(
        uri=uri,
        name=_registered_name(uri) or backbone,
        model_id=logged_model_id(MlflowClient(), uri),
        backbone=backbone,
        small_stem=small_stem,
        input_height=height,
        input_width=width,
        mean=mean,
        std=std,
    )


def _registered_name(uri: str) -> str | None:
    name, _, version = uri.removeprefix("models:/").partition("/")
    return name if uri.startswith("models:/") and version else None
