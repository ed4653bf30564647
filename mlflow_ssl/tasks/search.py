"""Find the images of an embedded data set that are nearest to some others."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mlflow_ssl.datasets.decode import DecodeError, decode
from mlflow_ssl.datasets.vector_index import ask, open_index
from mlflow_ssl.datasets.vectors import VectorStore, vectors
from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation.knn import nearest
from mlflow_ssl.pictures.sheet import Shown, sheet_html
from mlflow_ssl.tasks.embed import open_network, required, split_words
from mlflow_ssl.tracking.embedder import Embedder
from mlflow_ssl.tracking.report import log_report
from mlflow_ssl.transforms import apply, to_tensor

OWN = ("embeddings", "image", "neighbours", "model_uri", "report", "device", "trust_model")


def search(words: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Print the nearest images of some files, nearest first.

    Args:
        words: ``embeddings``, a folder that `mlflow_ssl.tasks.embed.embed` wrote; ``image``, a file or a list of them;
            ``neighbours``, by default 10; ``report``, a folder for a page that shows them; ``model_uri``, where the
            network is now; ``device``; and ``trust_model=true`` for a network that this project did not register.

    Returns:
        For each file a list of ``path``, ``class_name`` and ``similarity``, a cosine.

    Raises:
        InputError: if something is not there, or the network is not that of the embeddings.
    """
    given, others = split_words(words, own=OWN)
    if others:
        raise InputError(f"search takes {', '.join(OWN)}, got {others[0].removeprefix('datamodule.')}")
    store = VectorStore.open(Path(required(given, "embeddings")).expanduser())
    asked = given.get("image")
    files = [
        Path(str(file)).expanduser() for file in (asked if isinstance(asked, list) else [required(given, "image")])
    ]
    count = _count(given.get("neighbours", 10))
    # of the images what was said then; whether to trust is said each time
    embedder = open_network(
        str(given.get("model_uri") or store.manifest.model_uri), {**(store.manifest.preprocessing or {}), **given}
    )
    if embedder.digest != store.manifest.model_digest:
        raise InputError(
            f"model_uri must be the network of the embeddings, {store.manifest.model_uri}, got {embedder.uri}; embed "
            "the images with it, or leave model_uri out"
        )
    found = nearest_images(store, torch.stack([_embedding(embedder, file) for file in files]), count)
    for file, rows in zip(files, found, strict=True):
        sys.stdout.write(f"{file}\n" + "".join(_line(row) for row in rows))
    _write(files, found, root=Path(store.manifest.data_path), report=given.get("report"))
    return found


def nearest_images(store: VectorStore, queries: Tensor, count: int) -> list[list[dict[str, Any]]]:
    """Return the nearest images of each query ``(Q, D)``, by the store's faiss index or, without one, part by part."""
    index = open_index(store)
    return _by_scan(store, queries, count) if index is None else _by_index(store, index, queries, count)


def _by_index(store: VectorStore, index: Any, queries: Tensor, count: int) -> list[list[dict[str, Any]]]:
    similarities, rows = ask(index, queries.numpy(), count)
    starts = np.cumsum([0, *(size for size, _ in store.part_sizes())])
    parts = np.searchsorted(starts, rows, side="right") - 1
    columns = ["path", "class_name"]
    there = {part: store.part(part, columns).to_pylist() for part in np.unique(parts).tolist()}
    return [
        [
            {**there[part][row - starts[part]], "similarity": similarity}
            for similarity, part, row in zip(*of_query, strict=True)
        ]
        for of_query in zip(similarities.tolist(), parts.tolist(), rows.tolist(), strict=True)
    ]


def _by_scan(store: VectorStore, queries: Tensor, count: int) -> list[list[dict[str, Any]]]:
    best: pa.Table | None = None
    for part in store.read():
        found = nearest(queries, torch.from_numpy(vectors(part).copy()), min(count, len(part))) if len(part) else None
        if found is None:
            continue
        rows = found.indices.flatten().numpy()
        there = part.select(["path", "class_name"]).take(pa.array(rows))
        there = there.append_column("similarity", pa.array(found.similarities.flatten().numpy()))
        query = torch.arange(len(queries)).repeat_interleave(found.indices.shape[1])
        there = there.append_column("query", pa.array(query.numpy()))
        best = there if best is None else _nearest_of(pa.concat_tables([best, there]), count)
    rows_of: list[list[dict[str, Any]]] = [[] for _ in queries]
    for row in best.to_pylist() if best is not None else []:
        rows_of[row.pop("query")].append(row)
    return rows_of


def _nearest_of(table: pa.Table, count: int) -> pa.Table:
    """Keep the ``count`` most similar rows of each query; of equally near ones the first."""
    table = table.sort_by([("query", "ascending"), ("similarity", "descending")])
    query = table["query"].to_numpy()
    first = {number: row for row, number in reversed(list(enumerate(query.tolist())))}
    kept = [row for row, number in enumerate(query.tolist()) if row - first[number] < count]
    return table.take(pa.array(kept))


def _embedding(embedder: Embedder, file: Path) -> Tensor:
    try:
        pixels = decode(file.read_bytes())
    except (OSError, DecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"image must be a file that can be read, got {file}: {reason}") from error
    image = pixels if embedder.transform is None else apply(embedder.transform, pixels, draw=(0,))
    return embedder.embed(to_tensor(image).unsqueeze(0))[0]


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"neighbours must be a number from 1 on, got {value}")
    return value


def _line(row: dict[str, Any]) -> str:
    return f"  {row['similarity']:.4f}  {row['path']}" + (f"  {row['class_name']}\n" if row["class_name"] else "\n")


def _write(files: Sequence[Path], found: Sequence[Sequence[dict[str, Any]]], *, root: Path, report: Any) -> None:
    """Show query and neighbours on a page: in a folder, and in a run that ``mlflow run`` has opened."""
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if not (report or run_id):
        return
    sections = [
        (
            str(file),
            [[Shown(file, "asked"), *(Shown(inside(root, row["path"]), _line(row).strip()) for row in rows)]],
        )
        for file, rows in zip(files, found, strict=True)
    ]
    page = sheet_html("Nearest images", sections)
    if report:
        write_page(Path(str(report)).expanduser(), "search.html", page)
    if run_id:
        with tempfile.TemporaryDirectory() as scratch:
            write_page(Path(scratch), "search.html", page)
            log_report(run_id, Path(scratch), metrics={}, tags={}, artifact_path="search")


def inside(root: Path, path: str) -> Path | None:
    """Return a file of a data folder; None where there is none, or it is outside of the folder."""
    file = (root / path).resolve()
    return file if file.is_relative_to(root.resolve()) and file.is_file() else None


def write_page(folder: Path, name: str, page: str) -> None:
    """Write a page into a folder.

    Raises:
        InputError: if that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"report must be a folder that can be written, got {folder}: {error.strerror}") from error
