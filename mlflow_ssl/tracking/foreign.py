"""Networks that this project did not register: opened only where the user trusts them, since that runs their code.

The contract: float32 RGB images ``(B, 3, H, W)`` in [0, 1], resized with cubic interpolation and normalized where
something says how, go in; vectors ``(B, D)`` come out. A ``python_function`` whose signature is one column of texts
gets PNG files in base64 instead, and of one column of bytes the files.
"""

import base64
import hashlib
import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.models import Model
from mlflow.types import DataType
from PIL import Image
from torch import Tensor, nn

from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.answers import as_vectors
from mlflow_ssl.tracking.preprocessing import Preprocessing

log = logging.getLogger(__name__)

NOT_THE_MODEL = {
    "MLmodel",
    "registered_model_meta",
    "conda.yaml",
    "python_env.yaml",
    "requirements.txt",
    "input_example.json",
    "serving_input_example.json",
}
"""Files beside a model that do not change what it answers; `MLmodel` names run and time."""


class ForeignNetwork(nn.Module):
    """A model of others that is held to the contract.

    Args:
        model: takes images ``(B, 3, H, W)``, normalized where that is wanted.
        uri: names the model in errors.
    """

    def __init__(self, model: Callable[[Tensor], Any], uri: str) -> None:
        super().__init__()
        self.model = model
        self.uri = uri
        self.one_at_a_time = False

    @property
    def backbone(self) -> "ForeignNetwork":
        """What takes normalized images, as a network of ours has it: itself."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the vectors ``(B, D)``, float32 on the host.

        Raises:
            InputError: if the model fails, or gives something else.
        """
        batches = torch.split(images, 1) if self.one_at_a_time else [images]
        return torch.cat([self._answer(batch) for batch in batches])

    def _answer(self, images: Tensor) -> Tensor:
        # a graph that was exported for any number of images may still refuse a single one
        single = len(images) == 1 and not self.one_at_a_time
        asked = images.expand(2, -1, -1, -1).contiguous() if single else images
        try:
            given = self.model(asked)
        except Exception as error:  # it may be anything
            raise InputError(f"{self.uri} fails on images {tuple(asked.shape)}: {first_line(error)}") from error
        try:
            vectors = as_vectors(given)
        except ValueError as error:
            raise InputError(f"{self.uri} {error}") from error
        if len(vectors) != len(asked):
            raise InputError(f"{self.uri} must give a vector for each image, got {len(vectors)} for {len(asked)}")
        return torch.from_numpy(vectors)[: len(images)]


@dataclass(frozen=True)
class Foreign:
    """A network of others, ready to be asked.

    Attributes:
        network: see `ForeignNetwork`.
        preprocessing: what it was opened with.
        transform: the same, of albumentations: from pixels to what the network takes.
        embedding_size: numbers of a vector, D.
        digest: of the model's files and the preprocessing, 32 hexadecimal digits.
    """

    network: ForeignNetwork
    preprocessing: Preprocessing
    transform: Any
    embedding_size: int
    digest: str


def open_foreign(
    folder: Path, description: Model, uri: str, *, said: Preprocessing, trusted: bool, device: torch.device
) -> Foreign:
    """Load a model of others, which runs its code.

    Its signature says the size of the images where it is fixed, then the user, then a ``pretrained_cfg`` as timm has
    it: in the model's metadata, or of the network itself. The user's mean and std go before those of the latter.

    Args:
        folder: where it lies.
        description: its ``MLmodel``.
        uri: where it is from.
        said: what the user says.
        trusted: whether the user has said so.
        device: where it shall run, unless it is a ``python_function`` without ``pytorch``.

    Raises:
        InputError: if it is not trusted, takes no images, cannot be loaded or gives no vectors.
    """
    if not trusted:
        raise InputError(
            f"model_uri: {uri} is no network that this project registered, and loading another runs its code (it may "
            "be unpickled); add trust_model=true if you trust whoever made it"
        )
    wanted = _wanted(description, uri)
    model = _load(folder, description, uri, wanted, device)
    told = said if wanted.normalizes else replace(said, mean=None, std=None)
    preprocessing = Preprocessing(wanted.input_size).or_else(told)
    if wanted.normalizes:
        preprocessing = preprocessing.or_else(_described(description.metadata or {}, model))
    if preprocessing.input_size is None:
        raise InputError(f"input_size must be given, as {uri} does not say which images it takes; add input_size=224")
    network = ForeignNetwork(model, uri)
    size = _try(network, preprocessing.input_size, device)
    digest = _digest(folder, description, preprocessing)
    return Foreign(network, preprocessing, preprocessing.transform(), size, digest)


@dataclass(frozen=True)
class _Wanted:
    """What a signature says of the images, and how a batch of them becomes the model's input."""

    input_size: tuple[int, int] | None = None
    form: Callable[[Tensor], Any] = field(default=lambda images: images.cpu().numpy())
    normalizes: bool = True


def _wanted(description: Model, uri: str) -> _Wanted:
    inputs = description.signature.inputs if description.signature else None
    if inputs is None:
        return _Wanted()
    if not inputs.is_tensor_spec():
        return _of_columns(inputs, uri, pytorch="pytorch" in description.flavors)
    (spec, *more), shape = inputs.inputs, inputs.inputs[0].shape
    if more or len(shape) != 4 or shape[1] not in (3, -1) or spec.type.kind != "f":
        raise InputError(f"{uri} must take float images (B, 3, H, W), its signature says {inputs}")

    def form(images: Tensor) -> Any:
        pixels = images.cpu().numpy().astype(spec.type)
        return {spec.name: pixels} if spec.name else pixels

    return _Wanted((shape[2], shape[3]) if min(shape[2:]) > 0 else None, form)


def _of_columns(inputs: Any, uri: str, *, pytorch: bool) -> _Wanted:
    """Return how images become one column of files, the only table that images can be."""
    types = inputs.input_types()
    if pytorch or len(types) != 1 or types[0] not in (DataType.string, DataType.binary):
        raise InputError(f"{uri} must take images, its signature says {inputs}")

    def form(images: Tensor) -> Any:
        import pandas as pd  # type: ignore[import-untyped]

        files: list[Any] = [_png(image) for image in images.cpu()]
        if types[0] == DataType.string:
            files = [base64.b64encode(file).decode() for file in files]
        name = inputs.inputs[0].name
        return pd.DataFrame({name: files}) if name else files

    return _Wanted(None, form, normalizes=False)


def _png(image: Tensor) -> bytes:
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    written = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(written, "PNG", compress_level=1)
    return written.getvalue()


def _load(folder: Path, description: Model, uri: str, wanted: _Wanted, device: torch.device) -> Callable[[Tensor], Any]:
    try:
        if "pytorch" in description.flavors:
            # an exported graph takes no map_location
            where = {} if any(folder.rglob("*.pt2")) else {"map_location": device}
            network: nn.Module = mlflow.pytorch.load_model(str(folder), **where)
            return network.to(device)
        served = mlflow.pyfunc.load_model(str(folder))
    except Exception as error:  # unpickling raises anything
        raise InputError(
            f"model_uri: {uri} cannot be loaded: {first_line(error)}; its requirements.txt names what it needs"
        ) from error
    return lambda images: served.predict(wanted.form(images))


def _described(metadata: Mapping[str, Any], model: Any) -> Preprocessing:
    """Return what a description as timm has it says; in metadata, or of the network itself."""
    places = (metadata, getattr(model, "__dict__", {}))
    for described in (place.get(key) for place in places for key in ("pretrained_cfg", "default_cfg")):
        if isinstance(described, Mapping):
            return Preprocessing.of(described)
    return Preprocessing()


@torch.inference_mode()
def _try(network: ForeignNetwork, size: tuple[int, int], device: torch.device) -> int:
    """Return the size of a network's vectors; a graph that was exported for one image is asked for one at a time."""
    grey = torch.full((2, 3, *size), 0.5, device=device)
    try:
        vectors = network(grey)
    except InputError as error:
        network.one_at_a_time = True
        try:
            vectors = network(grey)
        except InputError:
            raise error from None  # what is wrong, said of two images
        log.warning("%s takes one image at a time, which is slow", network.uri)
    return int(vectors.shape[1])


def _digest(folder: Path, description: Model, preprocessing: Preprocessing) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder)
        if name.parts[0] in NOT_THE_MODEL or "__pycache__" in name.parts:
            continue
        digest.update(f"{name.as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    config = description.flavors.get("python_function", {}).get("config")
    digest.update(repr((config, preprocessing.as_dict())).encode())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """Return what an error of someone else's says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
