"""The trained network as a complete MLflow model in a local folder, ready to be registered now or later.

One model, two flavours that share one TorchScript file:

- ``pytorch``, for `mlflow.pytorch.load_model` and, its file, for `torch.jit.load`: tensors in, tensors out.
- ``python_function``, the service of `mlflow_ssl.tracking.service`: image files in; embeddings out, or of a classifier
  the names and probabilities of classes.

MLflow writes each of them, but has no call that writes both into one folder. So it writes them into two, and the
TorchScript file and the description of its flavour move to the other.
"""

import base64
import contextlib
import dataclasses
import io
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import albumentations
import mlflow
import numpy as np
import numpy.typing as npt
import torch
from mlflow.models import Model
from packaging.version import Version
from PIL import Image

from mlflow_ssl import transforms
from mlflow_ssl.datasets import decode
from mlflow_ssl.errors import InputError
from mlflow_ssl.export import DeploymentNetwork, ModelCard, traced

log = logging.getLogger(__name__)

SERVICE = Path(__file__).with_name("service.py")
MODEL, REGISTRATION = "model", "registration.json"
MOST_ENTRIES = 100_000
"""Embeddings of the bank that a model holds."""
EXAMPLE_SIDE = 256
"""Pixels of the longer side of the input example, at most."""
NAMED_CLASSES = 20
"""Classes that the description of a classifier names."""
TOP_K = 5
"""Classes that a classifier names for an image, unless it is asked for more."""


@dataclass(frozen=True)
class LabelledEmbeddings:
    """What the service looks for neighbours among: the training images by the validation transform.

    Args:
        embeddings: shape ``(N, D)``.
        labels: class of each, shape ``(N,)``, integers that number ``classes``.
        classes: names.
    """

    embeddings: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Registration:
    """What a version is registered as.

    Args:
        name: registered name; made if new.
        promote: whether it may become the champion.
        tags: of the version and of the logged model: its figures, by the name of the metric, and ``data.digest``.
        metric: the figure that decides about the champion.
        package: what tells this package from all others.
    """

    name: str
    promote: Literal["auto", "never"]
    tags: Mapping[str, str]
    metric: str = "test_acc"
    description: str = ""
    package: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def write(self, folder: Path) -> None:
        """Write this into a package."""
        (folder / REGISTRATION).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Registration":
        """Return what `write` wrote."""
        return cls(**json.loads((folder / REGISTRATION).read_text()))


def check_servable(transform: Any) -> None:
    """Check that the service can do ``transform`` without this package, before a training is spent on it.

    Args:
        transform: the validation transform, of albumentations; or None.

    Raises:
        InputError: if it cannot be written down, or comes back as another one.
    """
    described = _transform_as_dict(transform)
    if described is None:
        return
    rebuilt = albumentations.from_dict(described)
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 768, 3), dtype=np.uint8)
    try:
        expected, got = (transforms.apply(each, pixels, draw=(0,)) for each in (transform, rebuilt))
    except Exception as error:  # albumentations' own errors have no common class
        log.debug("val_transform does not take a picture of 1024 x 768: %s", error)
        return
    if not np.array_equal(np.asarray(expected), np.asarray(got)):
        raise InputError("datamodule.val_transform does something else once written down and read again")


def package_network(
    folder: Path,
    network: DeploymentNetwork,
    *,
    card: ModelCard,
    registration: Registration,
    transform: Any,
    bank: LabelledEmbeddings | None,
    example: npt.NDArray[np.uint8],
) -> None:
    """Write ``network`` as an MLflow model, and how to register it, into a new ``folder``.

    No server is asked. The folder appears whole or not at all.

    Args:
        folder: for ``model/`` and ``registration.json``.
        network: normalization and backbone.
        card: what it takes and gives.
        registration: name, figures and data of the version.
        transform: the validation transform, see `check_servable`.
        bank: for the neighbours; None where the images have no labels.
        example: a training image as an input example, RGB ``(H, W, 3)``.

    Raises:
        FileExistsError: if there is such a folder already.
        InputError: if the transform is not servable.
    """
    if folder.exists():
        raise FileExistsError(f"there is a package already: {folder}")
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)  # of an attempt that was killed
    scratch.mkdir(parents=True)
    try:
        _write_model(scratch, network, card, transform, bank, example)
        described = dataclasses.replace(registration, description=_description(registration, card, bank))
        described.write(scratch)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    log.info("packaged %s in %s", registration.name, folder)


def _write_model(
    folder: Path,
    network: DeploymentNetwork,
    card: ModelCard,
    transform: Any,
    bank: LabelledEmbeddings | None,
    example: npt.NDArray[np.uint8],
) -> None:
    target, pytorch = folder / MODEL, folder / "pytorch"
    example_batch = torch.rand(2, 3, *card.input_size, generator=torch.Generator().manual_seed(0))
    model = Model(metadata=dataclasses.asdict(card))
    answering, params = _classifying(card) if card.output == "logits" else ({}, {"neighbours": 0})
    with _without_advice():
        mlflow.pyfunc.save_model(
            target,
            python_model=SERVICE,
            model_config={"input_size": list(card.input_size), "transform": _transform_as_dict(transform)} | answering,
            # with the example's params, since MLflow takes the signature's from there
            input_example=([_as_base64(example)], params),
            pip_requirements=requirements(),
            mlflow_model=model,
        )
        mlflow.pytorch.save_model(
            traced(network, example_batch),
            pytorch,
            pip_requirements=requirements(),
            # of a TorchScript network this writes the plain archive, which loads without unpickling
            serialization_format="pickle",
        )
    _join(model, target, pytorch)
    _add_files(model, target, bank)
    model.model_size_bytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    model.save(target / "MLmodel")


def _classifying(card: ModelCard) -> tuple[dict[str, Any], dict[str, int]]:
    """Return what the service of a classifier has to know, and the parameters of a request with their defaults."""
    return {"classes": list(card.classes)}, {"top_k": TOP_K}


def _join(model: Model, target: Path, pytorch: Path) -> None:
    """Move the TorchScript file and its flavour into ``target``."""
    flavour = Model.load(pytorch).flavors["pytorch"]
    shutil.move(pytorch / flavour["model_data"], target / flavour["model_data"])
    shutil.rmtree(pytorch)
    model.add_flavor("pytorch", **flavour)


def _add_files(model: Model, target: Path, bank: LabelledEmbeddings | None) -> None:
    """Name the service's files to it: `mlflow.pyfunc.save_model` would copy the network, and keep our paths."""
    (target / "artifacts").mkdir()
    files = {"network": "data/model.pth"}
    for name, module in (("decode", decode), ("transforms", transforms)):
        files[name] = f"artifacts/{name}.py"
        shutil.copyfile(str(module.__file__), target / files[name])
    if bank is not None:
        files["bank"] = "artifacts/bank.npz"
        _write_bank(bank, target / files["bank"])
    flavour = model.flavors["python_function"]
    flavour["artifacts"] = {name: {"path": path, "uri": path} for name, path in files.items()}
    flavour["model_code_path"] = SERVICE.name


def _transform_as_dict(transform: Any) -> dict[str, Any] | None:
    """Return an albumentations transform in plain words, which JSON and YAML hold."""
    if transform is None:
        return None
    try:
        described: dict[str, Any] = json.loads(json.dumps(albumentations.to_dict(transform)))
        albumentations.from_dict(described)
    except Exception as error:  # albumentations raises what its parts raise
        raise InputError(f"datamodule.val_transform cannot be written down for the service: {error}") from error
    foreign = sorted(_foreign_classes(described))
    if foreign:
        raise InputError(
            "datamodule.val_transform must be of albumentations' own transforms, which the service has; got "
            f"{', '.join(foreign)}"
        )
    return described


def _foreign_classes(node: Any) -> Iterator[str]:
    """Yield the classes in a described transform that are not albumentations' own: those it names in full."""
    if isinstance(node, list):
        for item in node:
            yield from _foreign_classes(item)
    elif isinstance(node, dict):
        name = str(node.get("__class_fullname__", ""))
        if "." in name:
            yield name
        for value in node.values():
            yield from _foreign_classes(value)


def _write_bank(bank: LabelledEmbeddings, file: Path) -> None:
    """Write at most `MOST_ENTRIES` rows, evenly taken, at unit length and half precision."""
    rows = np.linspace(0, len(bank.labels) - 1, min(len(bank.labels), MOST_ENTRIES)).astype(np.int64)
    embeddings = np.asarray(bank.embeddings[rows], dtype=np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True).clip(1e-12)
    np.savez(
        file,
        embeddings=embeddings.astype(np.float16),
        labels=bank.labels[rows],
        classes=np.array(bank.classes, dtype=np.str_),
    )


def _as_base64(pixels: npt.NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    written = io.BytesIO()
    image.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def _description(registration: Registration, card: ModelCard, bank: LabelledEmbeddings | None) -> str:
    """Return what the version's page says, in Markdown; ``VERSION`` stands for its number."""
    uri = f"models:/{registration.name}/VERSION"
    height, width = card.input_size
    what, more = _classifier_words(card) if card.output == "logits" else _embedding_words(card, bank)
    return f"""\
{what}

**As a service** it takes image files in base64, of any size and mode, and does the preprocessing itself:

```
mlflow models serve -m "{uri}" --env-manager uv --port 5001
curl localhost:5001/invocations -H 'Content-Type: application/json' -d '{{"inputs": ["<base64>"]}}'
```

{more}
**In Python** it takes RGB tensors `(N, 3, {height}, {width})`, float32 in [0, 1], and normalizes them itself:

```python
network = mlflow.pytorch.load_model("{uri}")
{card.output} = network(images)
```
"""


def _embedding_words(card: ModelCard, bank: LabelledEmbeddings | None) -> tuple[str, str]:
    """Return what a network is, and what else its service can do."""
    neighbours = 'Add `"params": {"neighbours": 5}` for the five nearest training images, label and distance.\n'
    what = f"Self-supervised `{card.backbone}`: images to embeddings of {card.embedding_size} numbers."
    return what, neighbours if bank is not None else ""


def _classifier_words(card: ModelCard) -> tuple[str, str]:
    """Return what a classifier is, and what its service answers."""
    names = ", ".join(f"`{name}`" for name in card.classes[:NAMED_CLASSES])
    others = f" and {len(card.classes) - NAMED_CLASSES} more" if len(card.classes) > NAMED_CLASSES else ""
    return (
        f"Classifier on `{card.backbone}`: images to {len(card.classes)} classes, {names}{others}.",
        "It answers with `label`, `probability` and, in `top`, both for the likeliest classes: "
        f'{TOP_K} of them, or as many as `"params": {{"top_k": 10}}` asks for.\n',
    )


def requirements() -> list[str]:
    """Return what serving the network needs, pinned to public versions (a local one like ``+cpu`` is not to be had)."""
    names = ("mlflow", "torch", "numpy", "pillow", "albumentations", "opencv-python-headless")
    return [f"{name}=={Version(version(name)).public}" for name in names]


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Silence what MLflow says while it writes a model.

    That pickles are unsafe, of which there is none; that versions like ``+cpu`` are unusual; and that ``predict``
    should be checked by MLflow, and could not be run: the network is not there yet.
    """
    names = ("mlflow.pyfunc", "mlflow.pytorch", "mlflow.utils", "mlflow.types", "mlflow.models")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True):  # recorded, since MLflow sets filters of its own
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
