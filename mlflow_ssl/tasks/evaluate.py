"""Measure registered networks on a data set, side by side and against what needs no training."""

import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import csv
from rich.console import Console, Group
from rich.table import Table
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mlflow_ssl.datamodules.classification import ClassificationDataModule
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation.intervals import Interval
from mlflow_ssl.evaluation.scores import Labelled, Scores, compare, difference_rows, score
from mlflow_ssl.tasks.classes import write_classes
from mlflow_ssl.tasks.embed import OF_MODELS, embedded, open_data, open_network, required, split_words
from mlflow_ssl.tracking.embedder import Embedder
from mlflow_ssl.tracking.report import link_models, log_report, metric_place, new_run

log = logging.getLogger(__name__)

OWN = ("model_uri", "against", "baselines", "few_labels", "name", "report", *OF_MODELS)
PIXELS, UNTRAINED = "raw pixels", "untrained"
PIXELS_SIDE = 32
"""Pixels of a side that the baseline of pixels sees at most: 3,072 numbers an image, whatever the network takes."""
Way = tuple[Embedder, Callable[[Tensor], Tensor]]
"""A network, whose transform is taken, and what makes vectors of its images."""


@dataclass(frozen=True)
class Evaluation:
    """What came of it.

    Attributes:
        scores: by network, the one that was asked for first.
        differences: by how much that one exceeds each other.
        truth: class of each query, ``(Q,)``.
        queries: the images.
        classes: names.
        notes: what the reader must know of the networks, in lines.
    """

    scores: dict[str, Scores]
    differences: dict[str, dict[str, Interval]]
    truth: Tensor
    queries: ImageIndex
    classes: list[str]
    notes: list[str]

    @property
    def first(self) -> Scores:
        """Of the network that was asked for."""
        return next(iter(self.scores.values()))

    @property
    def shown(self) -> str | None:
        """The way of classifying that the tables of classes are of."""
        return self.first.shown


def evaluate(words: Sequence[str]) -> Evaluation:
    """Measure networks on the test images of a data set, or on the validation images where there are none.

    Args:
        words: ``model_uri``; ``data_path`` and whatever else a training tells its datamodule; ``against``, a list of
            other networks; ``baselines=false`` leaves out pixels and the untrained network; ``few_labels=false`` the
            classifiers of few labels; ``name`` of the experiment that a run is opened in, unless ``mlflow run`` has;
            ``report``, a folder for the files that the run gets; and those of `mlflow_ssl.tasks.embed.open_network`.

    Raises:
        InputError: if a network or the data are not there, or there is nothing to measure on.
    """
    given, overrides = split_words(words, own=OWN)
    against = given.get("against") or []
    uris = [required(given, "model_uri"), *(against if isinstance(against, list) else [against])]
    networks = [open_network(str(uri), given) for uri in uris]
    datamodule = open_data(overrides)
    splits = _splits(datamodule)
    ways: dict[str, Way] = {network.uri: (network, network.embed) for network in networks}
    notes = [f"{each.uri} sees images of {each.preprocessing}" for each in networks if each.preprocessing]
    if given.get("baselines", True):
        added, missing = _baselines(networks[0])
        ways, notes = ways | added, notes + missing
    few_labels = bool(given.get("few_labels", True))
    scores = {name: _score(name, way, datamodule, splits, few_labels=few_labels) for name, way in ways.items()}
    queries = datamodule.index.split(splits["queries"])
    truth = torch.from_numpy(queries.labels)
    # what cannot be read any more was left out of all
    result = Evaluation(scores, compare(scores, truth, seed=0), truth, queries, list(datamodule.classes), notes)
    report = render(result, datamodule)
    sys.stdout.write(report)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(str(given["report"])).expanduser() if given.get("report") else Path(scratch)
        write_files(result, report, folder, root=datamodule.root)
        _log(result, networks, datamodule, folder, name=str(given.get("name", "evaluation")))
    return result


def _baselines(network: Embedder) -> tuple[dict[str, Way], list[str]]:
    """Return what a network has to beat, by name; and why something is missing."""
    pixels: dict[str, Way] = {PIXELS: (network, pixel_vectors)}
    untrained = network.untrained()
    if untrained is None:
        return pixels, [f"no untrained network beside it: the weights of {network.uri} cannot be drawn anew"]
    return {UNTRAINED: (untrained, untrained.embed), **pixels}, []


def pixel_vectors(images: Tensor) -> Tensor:
    """Return images ``(B, 3, H, W)`` as vectors, averaged down to at most `PIXELS_SIDE` on a side."""
    height, width = (min(side, PIXELS_SIDE) for side in images.shape[2:])
    return adaptive_avg_pool2d(images, (height, width)).flatten(1)


def _splits(datamodule: ClassificationDataModule) -> dict[str, str]:
    """Return which split is asked, and which chooses: test and val, or val alone."""
    for queries, val in (("test", "val"), ("val", "")):
        if len(datamodule.index.split(queries)):
            return {"queries": queries, "val": val}
    raise InputError("there are no test and no validation images to measure on; set datamodule.test_size")


def _score(
    name: str,
    way: Way,
    datamodule: ClassificationDataModule,
    splits: Mapping[str, str],
    *,
    few_labels: bool,
) -> Scores:
    bank = _embedded(name, way, datamodule, "train")
    bank = bank.take((bank.labels >= 0).nonzero().flatten())
    if len(set(bank.labels.tolist())) < 2:
        bank = bank.take(torch.empty(0, dtype=torch.long))
    val = _embedded(name, way, datamodule, splits["val"]) if splits["val"] and len(bank) else None
    queries = _embedded(name, way, datamodule, splits["queries"])
    return score(bank, queries, val=val, few_labels=few_labels)


def _embedded(name: str, way: Way, datamodule: ClassificationDataModule, split: str) -> Labelled:
    network, embed = way
    images = datamodule.all_images(network.transform, split=split)
    if not len(images):
        return Labelled(torch.empty(0, 1), torch.empty(0, dtype=torch.long))
    ((embeddings, good),) = embedded(embed, images, [range(len(images))], doing=f"{name}, {split}")
    if not good.all():
        raise InputError(f"{int((~good).sum())} images of {split} cannot be read any more; run check-data on them")
    return Labelled(embeddings, torch.from_numpy(datamodule.index.split(split).labels))


# what is said of it


def render(result: Evaluation, datamodule: ClassificationDataModule) -> str:
    """Return the tables as text."""
    console = Console(width=120 if not sys.stdout.isatty() else None, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(f"{len(result.truth):,} images of {datamodule.root.name}, 95 % intervals")
        console.print("".join(f"{note}\n" for note in result.notes), soft_wrap=True)
        console.print(_figures(result))
        for name, rows in groupby(difference_rows(result.differences), key=itemgetter("against")):
            console.print()
            console.print(_differences(str(name), rows))
    return capture.get()


def _figures(result: Evaluation) -> Table:
    table = Table("", *result.scores)
    for figure in result.first.figures:
        table.add_row(figure, *(_cell(scores.figures.get(figure)) for scores in result.scores.values()))
    return table


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return ""
    value, low, high = interval
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f}  {low:.3f} to {high:.3f}"


def _differences(name: str, rows: Iterable[Mapping[str, Any]]) -> Group:
    table = Table("", "difference", "")
    for row in rows:
        cell = f"{row['difference']:+.3f}  {row['low']:+.3f} to {row['high']:+.3f}"
        table.add_row(row["figure"], cell, "may be noise" if row["may_be_noise"] else "")
    return Group(f"ahead of {name} by", table)


def write_files(result: Evaluation, report: str, folder: Path, *, root: Path) -> None:
    """Write tables, confusion matrix and the sheet of what is confused most.

    Raises:
        InputError: if that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.txt").write_text(report, encoding="utf-8")
        differences = difference_rows(result.differences)
        if differences:
            csv.write_csv(pa.Table.from_pylist(differences), folder / "differences.csv")
        rows = [
            {"network": name, "figure": figure, **interval._asdict()}
            for name, scores in result.scores.items()
            for figure, interval in scores.figures.items()
        ]
        csv.write_csv(pa.Table.from_pylist(rows), folder / "scores.csv")
        if result.shown is not None:
            predicted = result.first.predicted[result.shown]
            title = f"Confused most in {root.name}, by {result.shown}"
            write_classes(folder, result.truth, predicted, result.classes, result.queries.column("path"), root, title)
    except OSError as error:
        raise InputError(f"report must be a folder that can be written, got {folder}: {error.strerror}") from error


def _log(
    result: Evaluation, networks: Sequence[Embedder], datamodule: ClassificationDataModule, folder: Path, *, name: str
) -> None:
    """Log to the run that ``mlflow run`` has opened, or to a new one, that knows the models it is of."""
    uris = [network.uri for network in networks]
    run_id = os.environ.pop("MLFLOW_RUN_ID", None) or new_run(name, f"evaluate {uris[0].removeprefix('models:/')}")
    link_models(run_id, uris)
    metrics = dict(result.first.metrics)
    for network, scores in list(result.scores.items())[1:]:
        metrics |= {f"{metric_place(network)}/{figure}": interval.value for figure, interval in scores.figures.items()}
    tags = {"model_uri": networks[0].uri, "data.digest": datamodule.index.digest, "data.path": str(datamodule.root)}
    log_report(run_id, folder, metrics=metrics, tags=tags, artifact_path="evaluation")
    sys.stdout.write(f"run        {run_id}\n")
