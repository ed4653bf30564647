"""Find what looks like copies, and labels that look wrong, in an embedded data set."""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import csv

from mlflow_ssl.datasets.vectors import VectorStore, vectors
from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation.knn import Neighbours
from mlflow_ssl.evaluation.suspects import copy_groups, doubts, neighbours_within
from mlflow_ssl.pictures.sheet import Shown, sheet_html
from mlflow_ssl.tasks.embed import required, split_words
from mlflow_ssl.tasks.search import inside, write_page
from mlflow_ssl.tracking.report import log_report

OWN = ("embeddings", "threshold", "neighbours", "report")
SHOWN = 50
"""Groups and doubted labels on the page, the worst first; the tables hold all."""
MOST_OF_GROUP = 12
DOUBTED_BELOW = 0.5
"""Share of the neighbours' votes for an image's own class, below which its label is doubted."""


def duplicates(words: Sequence[str]) -> tuple[pa.Table, pa.Table]:
    """Write a page, and tables, of likely copies and likely label errors.

    Args:
        words: ``embeddings``, a folder that `mlflow_ssl.tasks.embed.embed` wrote; ``threshold``, the cosine from which
            two images are taken for copies, by default 0.98; ``neighbours`` that are asked for an image's class, by
            default 10; and ``report``, the folder for the page, by default the one of the embeddings.

    Returns:
        Copies, of ``group``, ``path``, ``class_name``, ``split`` and ``similarity`` to the nearest; and doubted labels,
        of ``path``, ``class_name``, ``votes`` for it, the ``likely`` class and its ``likely_votes``.

    Raises:
        InputError: if the embeddings are not there or not complete, or a number is out of its bounds.
    """
    given, others = split_words(words, own=OWN)
    if others:
        raise InputError(f"duplicates takes {', '.join(OWN)}, got {others[0].removeprefix('datamodule.')}")
    store = VectorStore.open(Path(required(given, "embeddings")).expanduser())
    threshold = _number(given, "threshold", 0.98, low=-1, high=1)
    images, embeddings = load(store)
    if len(images) < 2:
        raise InputError(f"embeddings must be of two images at least, got {len(images)} in {store.folder}")
    found = neighbours_within(embeddings, int(_number(given, "neighbours", 10, low=1, high=10_000)))
    copies, doubted = _copies(images, found, threshold), _doubted(images, found)
    _report(store, copies, doubted, images, found, report=Path(str(given.get("report") or store.folder)).expanduser())
    return copies, doubted


def load(store: VectorStore) -> tuple[pa.Table, torch.Tensor]:
    """Return images and embeddings ``(N, D)`` of a whole store, half as wide: a gigabyte for a million of 512."""
    tables, halves = [], []
    for part in store.read():
        tables.append(part.drop_columns(["embedding"]))
        halves.append(torch.from_numpy(vectors(part).astype(np.float16)))
    return pa.concat_tables(tables).combine_chunks(), torch.cat(halves)


def _copies(images: pa.Table, found: Neighbours, threshold: float) -> pa.Table:
    groups = copy_groups(found, threshold=threshold)
    table = images.select(["path", "class_name", "split"]).add_column(0, "group", pa.array(groups))
    table = table.append_column("similarity", pa.array(found.similarities[:, 0].numpy()))
    return table.filter(pa.array(groups >= 0)).sort_by([("group", "ascending"), ("path", "ascending")])


def _doubted(images: pa.Table, found: Neighbours) -> pa.Table:
    labels = torch.from_numpy(images["label"].to_numpy().astype(np.int64))
    names = {row["label"]: row["class_name"] for row in images.select(["label", "class_name"]).to_pylist()}
    answer = doubts(found, labels)
    rows = (answer.own < DOUBTED_BELOW).nonzero().flatten()
    rows = rows[answer.own[rows].argsort(stable=True)]
    table = images.select(["path", "class_name"]).take(pa.array(rows.numpy()))
    table = table.append_column("votes", pa.array(answer.own[rows].numpy()))
    table = table.append_column("likely", pa.array([names.get(label, "") for label in answer.other[rows].tolist()]))
    return table.append_column("likely_votes", pa.array(answer.share[rows].numpy()))


def _report(
    store: VectorStore, copies: pa.Table, doubted: pa.Table, images: pa.Table, found: Neighbours, *, report: Path
) -> None:
    root = Path(store.manifest.data_path)
    num_groups = len(pc.unique(copies["group"]))
    leaked = _num_leaking(copies)
    sections = [
        (f"{num_groups} groups of likely copies, {leaked} of them across splits", _copy_rows(copies, root)),
        (f"{len(doubted)} labels that their neighbours contradict", _doubted_rows(doubted, images, found, root)),
    ]
    page = sheet_html(f"Likely copies and label errors in {root.name}", sections)
    files = {"copies": copies, "doubted_labels": doubted}
    _write(report, page, files, before="_" if report == store.folder else "")
    sys.stdout.write(
        f"copies     {len(copies):,} images in {num_groups:,} groups, {leaked:,} of them across splits\n"
        f"labels     {len(doubted):,} that the neighbours contradict\n"
        f"report     {report}\n"
    )
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id:
        with tempfile.TemporaryDirectory() as scratch:
            _write(Path(scratch), page, files)
            metrics = {"data/likely_copies": len(copies), "data/doubted_labels": len(doubted)}
            tags = {"model_uri": store.manifest.model_uri, "data.digest": store.manifest.data_digest}
            log_report(run_id, Path(scratch), metrics=metrics, tags=tags, artifact_path="duplicates")


def _write(folder: Path, page: str, tables: Mapping[str, pa.Table], *, before: str = "") -> None:
    """Write page and tables; beside embeddings their names begin so that readers of Parquet pass them over."""
    write_page(folder, f"{before}duplicates.html", page)
    for name, table in tables.items():
        csv.write_csv(table, folder / f"{before}{name}.csv")


def _num_leaking(copies: pa.Table) -> int:
    pairs = copies.select(["group", "split"]).group_by(["group"]).aggregate([("split", "count_distinct")])
    return int(pc.sum(pc.greater(pairs["split_count_distinct"], 1)).as_py() or 0)


def _copy_rows(copies: pa.Table, root: Path) -> list[list[Shown]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in copies.to_pylist():
        groups.setdefault(row["group"], []).append(row)
    closest = sorted(groups.values(), key=lambda group: -max(row["similarity"] for row in group))
    return [[_shown(row, root, row["similarity"]) for row in group[:MOST_OF_GROUP]] for group in closest[:SHOWN]]


def _doubted_rows(doubted: pa.Table, images: pa.Table, found: Neighbours, root: Path) -> list[list[Shown]]:
    worst = doubted.slice(0, SHOWN).to_pylist()
    places = pc.index_in(pa.array([row["path"] for row in worst], images["path"].type), value_set=images["path"])
    rows = []
    for row, place in zip(worst, places.to_pylist(), strict=True):
        words = f"{row['path']}  {row['class_name']} ({row['votes']:.0%}), likely {row['likely']}"
        there = images.take(pa.array(found.indices[place, :5].numpy())).to_pylist()
        similar = found.similarities[place, :5].tolist()
        shown = [_shown(image, root, cosine) for image, cosine in zip(there, similar, strict=True)]
        rows.append([Shown(inside(root, row["path"]), words), *shown])
    return rows


def _shown(row: dict[str, Any], root: Path, similarity: float) -> Shown:
    return Shown(inside(root, row["path"]), f"{row['path']}  {row['class_name']}  {similarity:.3f}")


def _number(given: dict[str, Any], key: str, default: float, *, low: float, high: float) -> float:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{key} must be a number between {low} and {high}, got {value}")
    return value
