"""Embed every image of a data set with a registered network, in constant memory, and go on where it was stopped."""

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mlflow_ssl.config import build, compose_config, parse_word
from mlflow_ssl.datamodules.classification import ClassificationDataModule
from mlflow_ssl.datamodules.loading import free_memory, nbytes, plan_loading, usable_cores
from mlflow_ssl.datasets.bad_images import BAD_LABEL, BadImageList
from mlflow_ssl.datasets.image import ImageDataset
from mlflow_ssl.datasets.progress import Counting
from mlflow_ssl.datasets.vector_index import INDEX, build_index
from mlflow_ssl.datasets.vectors import BAD_IMAGES, MANIFEST, Manifest, VectorStore
from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.embedder import Embedder, open_embedder
from mlflow_ssl.tracking.preprocessing import Preprocessing
from mlflow_ssl.tracking.report import log_report

log = logging.getLogger(__name__)

BATCH_SIZE = 64
OF_MODELS = ("device", "trust_model", "input_size", "mean", "std")
"""Words about opening networks."""
OWN = ("model_uri", "output", "index", "upload", *OF_MODELS)
"""Words that are not the datamodule's."""
UPLOADED = 2**30
"""Bytes of embeddings that a run gets without being told to."""


def embed(words: Sequence[str]) -> VectorStore:
    """Write the embeddings of a data set to a folder of Parquet files.

    Args:
        words: ``model_uri``; ``data_path`` and whatever else a training tells its datamodule; ``output``, by default a
            folder below ``outputs/embeddings`` that is named by network and data; ``index=true`` for a faiss index
            beside them; ``upload``, whether the run that ``mlflow run`` has opened gets them: ``true``, ``false``, or
            ``auto`` for up to a gigabyte; and those of `open_network`.

    Raises:
        InputError: if network or data are not there, or ``output`` holds something else.
    """
    began = time.monotonic()
    given, overrides = split_words(words, own=OWN)
    indexed = _chosen(given, "index", (True, False), default=False)
    upload = _chosen(given, "upload", (True, False, "auto"), default="auto")
    if upload is True and "MLFLOW_RUN_ID" not in os.environ:
        raise InputError("upload=true needs a run that gets the embeddings, which `mlflow run . -e embed` opens")
    embedder = open_network(required(given, "model_uri"), given)
    datamodule = open_data(overrides)
    store = _open_store(given.get("output"), embedder, datamodule)
    images = datamodule.all_images(embedder.transform)
    images.bad_images = BadImageList(store.folder / BAD_IMAGES)
    if not images.bad_images.file.exists():
        images.bad_images.start(datamodule.bad_images)
    known = store.manifest.num_parts - len(store.missing)
    fill(store, embedder, images, datamodule)
    if indexed:
        build_index(store)
    seconds = time.monotonic() - began
    _report(store, seconds, known=known, indexed=indexed)
    _log(store, seconds, upload=upload)
    return store


def open_network(uri: str, given: Mapping[str, Any]) -> Embedder:
    """Open a network as words say.

    Args:
        uri: where it is.
        given: ``device``; and of a network that this project did not register: ``trust_model=true`` to load it at all,
            ``input_size``, ``mean`` and ``std`` of the images that it takes.

    Raises:
        InputError: if there is no such network, or it is not trusted.
    """
    trusted = _chosen(given, "trust_model", (True, False), default=False)
    return open_embedder(
        uri, device=str(given.get("device", "auto")), said=Preprocessing.of(given), trusted=trusted is True
    )


def _chosen(given: Mapping[str, Any], key: str, choices: Sequence[Any], *, default: Any) -> Any:
    """Return a word that is one of a few."""
    value = given.get(key, default)
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        names = " or ".join(str(choice).lower() if isinstance(choice, bool) else choice for choice in choices)
        raise InputError(f"{key} must be {names}, got {value}")
    return value


def open_data(overrides: Sequence[str]) -> ClassificationDataModule:
    """Return the images that words of a datamodule describe; those that cannot be read are left out.

    Raises:
        InputError: if there are none.
    """
    config = compose_config(["experiment=base/ssl/byol", *overrides])
    if "data_path" not in {key.removeprefix("datamodule.") for key, _ in map(parse_word, overrides)}:
        raise InputError("data_path must be given; add data_path=FOLDER")
    datamodule: ClassificationDataModule = build(
        config.datamodule, **{"on_bad_image": "skip", "cache": "none", "augmentation_dataset": object()}
    )
    return datamodule


def split_words(words: Sequence[str], *, own: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a task's own words by key, and the others as overrides of the datamodule."""
    given: dict[str, Any] = {}
    overrides = []
    for word in words:
        key, value = parse_word(word)
        if key in own:
            given[key] = value
        else:
            whole = key == "data_path" or key.startswith(("datamodule.", "core.", "experiment"))
            overrides.append(word if whole else f"datamodule.{word}")
    return given, overrides


def required(given: dict[str, Any], key: str) -> str:
    """Return a word that must be there.

    Raises:
        InputError: if it is not.
    """
    if not given.get(key):
        raise InputError(f"{key} must be given; add {key}=...")
    return str(given[key])


def _open_store(output: Any, embedder: Embedder, datamodule: ClassificationDataModule) -> VectorStore:
    manifest = Manifest(
        model_uri=embedder.uri,
        model_digest=embedder.digest,
        data_path=str(datamodule.root),
        data_digest=datamodule.index.digest,
        embedding_size=embedder.embedding_size,
        num_images=len(datamodule.index),
        preprocessing=embedder.preprocessing.as_dict() if embedder.preprocessing else None,
    )
    named = Path("outputs", "embeddings", f"{manifest.model_digest[:12]}-{manifest.data_digest[:12]}")
    return VectorStore.create(Path(str(output)).expanduser() if output else named, manifest)


def fill(store: VectorStore, embedder: Embedder, images: ImageDataset, datamodule: ClassificationDataModule) -> None:
    """Embed what is missing in a store, and write each part as soon as it is whole."""
    missing, table = store.missing, datamodule.index.table
    parts = [store.manifest.rows(part) for part in missing]
    for part, rows, (vectors, kept) in zip(missing, parts, embedded(embedder.embed, images, parts), strict=True):
        good = pa.array(kept.numpy())
        store.write(part, table.slice(rows.start, len(rows)).filter(good), vectors[kept].numpy())


def embedded(
    embed: Callable[[Tensor], Tensor], images: ImageDataset, parts: Sequence[range], *, doing: str = "embedding"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the embeddings ``(N, D)`` of each part of some images, and which of them could be read, ``(N,)``."""
    batches = iter(_loader(images, [batch for part in parts for batch in _batches(part)]))
    with Counting(doing, "images", sum(map(len, parts))) as counting:
        for part in parts:
            embeddings, good = [], []
            for _ in _batches(part):
                pictures, labels = next(batches)
                embeddings.append(embed(pictures))
                good.append(labels != BAD_LABEL)
                counting.advance(len(labels))
            yield torch.cat(embeddings), torch.cat(good)


def _batches(rows: range) -> list[range]:
    return [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]


def _loader(images: ImageDataset, batches: list[range]) -> DataLoader[Any]:
    specimen: list[Tensor] = [images[batch[0]][0] for batch in batches[:1]]
    plan = plan_loading(
        "auto",
        cores=usable_cores(),
        processes=1,
        gpu=torch.cuda.is_available(),
        batch_bytes=BATCH_SIZE * nbytes(specimen),
        free_bytes=free_memory(),
    )
    few = sum(map(len, batches)) <= 4 * BATCH_SIZE  # processes take longer to start
    return DataLoader(
        images,
        batch_sampler=[list(batch) for batch in batches],
        num_workers=0 if few else plan.workers,
        prefetch_factor=None if few else plan.prefetch,
        pin_memory=plan.pinned,
    )


def _report(store: VectorStore, seconds: float, *, known: int, indexed: bool) -> None:
    manifest = store.manifest
    embedded = num_embedded(store)
    lost = manifest.num_images - embedded
    lines = [
        f"embedded   {embedded:,} images, {manifest.embedding_size} numbers each, in {seconds:.0f} s"
        + (f"; {known} of {manifest.num_parts} parts were there" if known else ""),
        *([f"left out   {lost:,} images that cannot be read"] if lost else []),
        f"network    {manifest.model_uri}",
        *([f"images     {Preprocessing.of(manifest.preprocessing)}"] if manifest.preprocessing else []),
        f"output     {store.folder}",
        *([f"index      {store.folder / INDEX}"] if indexed else []),
        "load",
        "  import pandas",
        f"  table = pandas.read_parquet({str(store.folder)!r})",
    ]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _log(store: VectorStore, seconds: float, *, upload: bool | str) -> None:
    """Log to the run that ``mlflow run`` has opened: the embeddings, or where they are."""
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if not run_id:
        return
    manifest, count = store.manifest, num_embedded(store)
    metrics = {"embed/images": count, "embed/images_per_second": count / max(seconds, 1e-9)}
    tags = {
        "model_uri": manifest.model_uri,
        "data.digest": manifest.data_digest,
        "embeddings.path": str(store.folder.resolve()),
    }
    size = sum(file.stat().st_size for file in store.folder.iterdir() if file.is_file())
    if upload is True or (upload == "auto" and size <= UPLOADED):
        log_report(run_id, store.folder, metrics=metrics, tags=tags, artifact_path="embeddings")
        return
    if upload == "auto":
        log.warning("the run gets no embeddings, as they are %.1f GB; add upload=true for all the same", size / 1e9)
    with tempfile.TemporaryDirectory() as scratch:
        for name in (MANIFEST, BAD_IMAGES):
            shutil.copyfile(store.folder / name, Path(scratch, name))
        log_report(run_id, Path(scratch), metrics=metrics, tags=tags, artifact_path="embeddings")


def num_embedded(store: VectorStore) -> int:
    """Return how many images are in a store."""
    return sum(rows for rows, _ in store.part_sizes())
