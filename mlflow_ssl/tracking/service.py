"""The registered network as a service: image files in; embeddings, or classes and their probabilities, out.

`mlflow_ssl.tracking.packaging` copies this file into each model, where MLflow runs it without this package. So it
imports nothing of ours. What it must share with the training, how files are decoded and transforms drawn, it loads from
copies of those very files that lie in the model, under no name that an installed package could have.
"""

import base64
import binascii
import importlib.util
import io
import json
import os
import threading
import uuid
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from PIL import Image, UnidentifiedImageError
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow 3.17 warns about its own type hints
    from mlflow.pyfunc import PythonModel  # type: ignore[attr-defined]

BATCH_SIZE = 64
"""Images that are decoded and embedded at once; bounds the memory of a large request."""


class BadInput(MlflowException):
    """A mistake of the client: HTTP 400."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, error_code=INVALID_PARAMETER_VALUE)
        self.reason = reason

    def serialize_as_json(self) -> str:
        """Return the body of the answer: the reason alone.

        MLflow's server writes the whole request into ``message``, which is megabytes of base64.
        """
        return json.dumps({"error_code": self.error_code, "message": self.reason})


class Answers(Protocol):
    """Makes rows of an answer of what the network gives."""

    def check(self, params: dict[str, Any]) -> int:
        """Return how many things are asked for with each image.

        Raises:
            BadInput: if it is not possible.
        """
        ...

    def rows(self, outputs: Tensor, asked: int) -> list[Any]:
        """Return a row for each of some outputs ``(B, D)``."""
        ...


class Embeddings:
    """Each row an embedding, a list of D numbers; with neighbours a dictionary, see `Bank.nearest`."""

    def __init__(self, bank: "Bank | None") -> None:
        self._bank = bank

    def check(self, params: dict[str, Any]) -> int:
        """Return how many neighbours are asked for: the parameter ``neighbours``, by default none."""
        asked = int(params.get("neighbours") or 0)
        if asked and self._bank is None:
            raise BadInput(f"params.neighbours must be 0, got {asked}: this model was trained on images without labels")
        most = len(self._bank) if self._bank is not None else 0
        if not 0 <= asked <= most:
            raise BadInput(f"params.neighbours must be between 0 and the {most} images of the bank, got {asked}")
        return asked

    def rows(self, outputs: Tensor, asked: int) -> list[Any]:
        """Return the embeddings; with neighbours, dictionaries of ``embedding`` and ``neighbours``."""
        if not asked or self._bank is None:
            return outputs.tolist()
        neighbours = self._bank.nearest(outputs, asked)
        return [
            {"embedding": embedding, "neighbours": nearest}
            for embedding, nearest in zip(outputs.tolist(), neighbours, strict=True)
        ]


class Classes:
    """Each row a dictionary: ``label`` and ``probability`` of the likeliest class; in ``top``, those of the next too.

    Args:
        names: of the classes, in the order of the logits.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def check(self, params: dict[str, Any]) -> int:
        """Return how many classes are named: the parameter ``top_k``, or all if there are fewer."""
        asked = int(params.get("top_k", 1))
        if asked < 1:
            raise BadInput(f"params.top_k must be 1 or more, got {asked}")
        return min(asked, len(self._names))

    def rows(self, outputs: Tensor, asked: int) -> list[Any]:
        """Return the likeliest classes by the logits ``(B, C)``, the likeliest first."""
        likeliest, index = outputs.softmax(dim=1).topk(asked, dim=1)
        rows = []
        for probabilities, numbers in zip(likeliest.tolist(), index.tolist(), strict=True):
            top = [
                {"label": self._names[number], "probability": probability}
                for number, probability in zip(numbers, probabilities, strict=True)
            ]
            rows.append({**top[0], "top": top})
        return rows


class Bank:
    """Training embeddings and their labels, to look for neighbours among.

    Args:
        file: ``.npz`` of ``embeddings`` ``(N, D)``, ``labels`` ``(N,)`` and ``classes``, the names that the labels
            number.
    """

    def __init__(self, file: str) -> None:
        with np.load(file, allow_pickle=False) as stored:
            self._embeddings = F.normalize(torch.from_numpy(stored["embeddings"]).float(), dim=1)
            self._labels = stored["labels"]
            self._classes = stored["classes"].tolist()

    def __len__(self) -> int:
        """Return the number of embeddings."""
        return len(self._labels)

    def nearest(self, queries: Tensor, num_neighbours: int) -> list[list[dict[str, Any]]]:
        """Return the nearest entries of each row of ``queries`` ``(Q, D)``, nearest first.

        Each is its ``label`` and its cosine ``distance``, in [0, 2].
        """
        similarity = F.normalize(queries, dim=1) @ self._embeddings.T  # (Q, N)
        nearest, index = similarity.topk(num_neighbours, dim=1)
        distances = (1 - nearest).clamp_min(0).tolist()  # an entry found itself: rounding may give less than 0
        labels = self._labels[index.numpy()]
        return [
            [{"label": self._classes[label], "distance": distance} for label, distance in zip(*row, strict=True)]
            for row in zip(labels, distances, strict=True)
        ]


class ImageService:
    """Answers about whatever form of images a client has, by the preprocessing of the validation.

    Requests may come from several threads at once.
    """

    def load_context(self, context: Any) -> None:
        """Load the network, its preprocessing, and what its answers are made of.

        Args:
            context: MLflow's: ``artifacts`` are the files ``network`` (TorchScript), ``decode`` and ``transforms``
                (Python) and, if there is one, ``bank``; ``model_config`` holds ``input_size`` (height and width),
                ``transform`` (an albumentations transform as a dictionary, or None) and, of a classifier, ``classes``.
        """
        artifacts, config = context.artifacts, context.model_config
        self._decode = _load_module(artifacts["decode"]).decode
        self._transforms = _load_module(artifacts["transforms"])
        self._network = _load_network(artifacts["network"])
        self._answers: Answers
        if "classes" in config:
            self._answers = Classes(config["classes"])
        else:
            self._answers = Embeddings(Bank(artifacts["bank"]) if "bank" in artifacts else None)
        self._input_shape = (3, *config["input_size"])
        self._transform_as_dict = config["transform"]
        self._of_thread = threading.local()

    def predict(
        self, context: Any, model_input: list[str | bytes | list[Any]], params: dict[str, Any] | None = None
    ) -> list[Any]:
        """Return one row for each image.

        Args:
            context: not used.
            model_input: images as a list, an array, a series or a frame of one column. Each is one of: the bytes of an
                image file; the same in base64, also as a ``data:`` URL; RGB pixels ``(H, W, 3)``, integers 0..255, of
                any size; an RGB tensor ``(3, H, W)`` of the network's size, in [0, 1], which is not transformed.
            params: ``neighbours``: how many of the nearest training images to return, 0 for none; of a classifier
                ``top_k``: how many of the likeliest classes.

        Returns:
            What `Embeddings.rows` or, of a classifier, `Classes.rows` say.

        Raises:
            BadInput: naming the first image that is wrong, and why.
        """
        images = _as_list(model_input)
        asked = self._answers.check(params or {})
        rows: list[Any] = []
        for start in range(0, len(images), BATCH_SIZE):
            outputs = self._outputs(images[start : start + BATCH_SIZE], start)
            rows += self._answers.rows(outputs, asked)
        return rows

    @torch.inference_mode()
    def _outputs(self, images: list[Any], start: int) -> Tensor:
        """Return what the network gives, ``(B, D)``, of a batch that begins with image number ``start``."""
        prepared = []
        for number, image in enumerate(images, start):
            try:
                prepared.append(self._prepare(image))
            except ValueError as error:
                raise BadInput(f"image {number} {error}") from error
        outputs: Tensor = self._network(torch.stack(prepared))
        return outputs

    def _prepare(self, image: Any) -> Tensor:
        """Return an image as the network takes it, ``(3, H, W)`` in [0, 1].

        Raises:
            ValueError: what is wrong with it, to be read after its number.
        """
        if isinstance(image, str):
            image = _from_base64(image)
        if isinstance(image, bytes | bytearray | memoryview):
            return self._transformed(self._read(bytes(image)))
        array = _as_array(image)
        if array.shape == self._input_shape:
            return _unit_tensor(array)
        if array.ndim == 3 and array.shape[2] == 3 and array.dtype.kind in "iu":
            return self._transformed(_bytes_of_pixels(array))
        raise ValueError(
            "must be a file, base64 of one, integers of shape (height, width, 3) or numbers of shape "
            f"{self._input_shape}, got {array.dtype.name} of shape {array.shape}"
        )

    def _read(self, data: bytes) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(data)) as header:
                num_pixels = header.width * header.height
            if Image.MAX_IMAGE_PIXELS is None or num_pixels <= Image.MAX_IMAGE_PIXELS:
                return self._decode(data)  # type: ignore[no-any-return]
        except UnidentifiedImageError as error:
            raise ValueError("is not an image file that Pillow reads") from error
        except Exception as error:  # Pillow's readers raise anything for broken or hostile bytes
            raise ValueError(f"cannot be decoded: {error}") from error
        raise ValueError(f"has {num_pixels} pixels, at most {Image.MAX_IMAGE_PIXELS} are decoded")

    def _transformed(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """Return pixels after the validation transform, its normalization undone: the network normalizes itself."""
        try:
            drawn = self._draw(pixels)
        except Exception as error:  # as a crop larger than the picture; albumentations' errors have no common class
            raise ValueError(f"cannot be preprocessed: {error}") from error
        normalized: Tensor = self._transforms.to_tensor(drawn)
        if normalized.shape != self._input_shape:  # without a transform that resizes
            raise ValueError(f"must be of height and width {self._input_shape[1:]}, got {tuple(normalized.shape[1:])}")
        unit: Tensor = normalized * self._network.std[0] + self._network.mean[0]
        return unit

    def _draw(self, pixels: npt.NDArray[np.uint8]) -> Any:
        if self._transform_as_dict is None:
            return pixels
        # albumentations' transforms hold random state: one for each thread
        if not hasattr(self._of_thread, "transform"):
            self._of_thread.transform = _build_transform(self._transform_as_dict)
        return self._transforms.apply(self._of_thread.transform, pixels, draw=(0,))


class _Model(ImageService, PythonModel):
    """What MLflow calls.

    It inherits ``predict``: where a `PythonModel` defines it, MLflow refuses arrays before we see them.
    """


def _load_module(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{Path(file).stem}_{uuid.uuid4().hex}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"not a Python file: {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_network(file: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's notice that TorchScript is deprecated
        return torch.jit.load(file, map_location="cpu").eval()  # type: ignore[no-untyped-call]


def _build_transform(as_dict: dict[str, Any]) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version otherwise
    import albumentations

    return albumentations.from_dict(as_dict)


def _as_list(model_input: Any) -> list[Any]:
    if isinstance(model_input, pd.DataFrame):
        if len(model_input.columns) != 1:
            raise BadInput(f"inputs must be one column of images, got {len(model_input.columns)} columns")
        model_input = model_input.iloc[:, 0]
    if not isinstance(model_input, list | tuple | np.ndarray | pd.Series) or getattr(model_input, "ndim", 1) == 0:
        raise BadInput(f"inputs must be a list of images, got {type(model_input).__name__}")
    return list(model_input)


def _as_array(image: Any) -> npt.NDArray[Any]:
    try:
        array = np.asarray(image)
    except ValueError as error:
        raise ValueError("must have rows of one length") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"must be a file, base64 of one, or numbers, got {type(image).__name__}")
    return array


def _from_base64(text: str) -> bytes:
    head, comma, rest = text.partition(",")
    if comma and head.startswith("data:") and not head.endswith(";base64"):
        raise ValueError("must be a data: URL in base64")
    coded = rest if comma and head.startswith("data:") else text
    try:
        return base64.b64decode("".join(coded.split()), validate=True)  # line breaks, as the command base64 makes
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"is not base64: {error}") from error


def _unit_tensor(array: npt.NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(array.astype(np.float32))
    slack = 1e-3  # rounding of a client that normalized and went back
    if not bool(((tensor >= -slack) & (tensor <= 1 + slack)).all()):
        raise ValueError(f"must be in [0, 1], got {tensor.min().item():g} to {tensor.max().item():g}")
    return tensor


def _bytes_of_pixels(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.size == 0 or array.min() < 0 or array.max() > 255:
        raise ValueError("must have pixels of 0..255")
    return array.astype(np.uint8)


set_model(_Model())
