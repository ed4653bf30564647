"""Look at a data set before anything is trained on it, and report."""

import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import OmegaConf
from pyarrow import csv
from rich.console import Console, Group
from rich.table import Table

from mlflow_ssl.config import build, compose_config, parse_word, quote_text
from mlflow_ssl.datasets.bad_images import BadImage, BadImageList
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.datasets.survey import by_class, copies, differing, oddest
from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.report import log_report

SHOWN = 10
"""Rows of a table that are printed; the files hold all."""


@dataclass(frozen=True)
class Survey:
    """What was found."""

    index: ImageIndex
    bad: list[BadImage]
    classes: pa.Table
    copies: pa.Table
    leaks: pa.Table
    contradictions: pa.Table
    odd: list[dict[str, Any]]

    @property
    def metrics(self) -> dict[str, float]:
        """Counts, as a run shows them."""
        return {
            "data/images": len(self.index),
            "data/bad_images": len(self.bad),
            "data/copies": len(self.copies) - len(pc.unique(self.copies["digest"])),
            "data/leaked": sum(split != "train" for split in self.leaks["split"].to_pylist()),
        }


def check_data(words: Sequence[str]) -> None:
    """Read every image of a data set and print what is wrong with it.

    Args:
        words: overrides of the datamodule, as a training takes them, with or without ``datamodule.`` before them; and
            ``report=FOLDER`` for files of all that is found. A first word without ``=`` is the path. In a run that
            ``mlflow run`` has opened, the files become its artifacts.

    Raises:
        InputError: if there is no such data set, or no image of it can be read.
    """
    logging.getLogger("mlflow_ssl").setLevel(logging.WARNING)
    overrides, folder = _split_words(words)
    config = compose_config(overrides)
    if OmegaConf.is_missing(config.datamodule, "data_path"):
        raise InputError("data_path must be given: check-data FOLDER")
    datamodule = build(
        config.datamodule,
        **{"on_bad_image": "skip", "verify": "all", "cache": "none", "augmentation_dataset": _NoViews()},
    )
    index = datamodule.index
    copied = copies(index)
    survey = Survey(
        index,
        datamodule.bad_images,
        by_class(index),
        copied,
        differing(copied, "split"),
        differing(copied, "class_name"),
        oddest(index),
    )
    report = render(survey, root=datamodule.root)
    sys.stdout.write(report)
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if folder:
        write_report(survey, report, Path(folder).expanduser())
    if run_id:
        with tempfile.TemporaryDirectory() as scratch:
            write_report(survey, report, Path(scratch))
            log_report(run_id, Path(scratch), metrics=survey.metrics, tags={"data.digest": index.digest})


class _NoViews:
    """Stands where a training would draw views."""


def _split_words(words: Sequence[str]) -> tuple[list[str], str | None]:
    overrides, folder = ["experiment=base/ssl/byol"], None
    for number, word in enumerate(words):
        if number == 0 and "=" not in word:
            word = f"data_path={quote_text(word)}"
        key, value = parse_word(word)
        if key == "report":
            folder = str(value)
        elif key.startswith(("datamodule.", "core.")) or key == "experiment":
            overrides.append(word)
        else:
            overrides.append(f"datamodule.{word}")
    return overrides, folder


def render(survey: Survey, *, root: Path) -> str:
    """Return the report as text."""
    console = Console(width=110 if not sys.stdout.isatty() else None, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for part in _parts(survey, root):
            console.print(part)
            console.print()
    return capture.get()


def _parts(survey: Survey, root: Path) -> list[Any]:
    parts: list[Any] = [_overview(survey, root)]
    if survey.bad:
        reasons = Counter(image.reason.partition(":")[0] for image in survey.bad)
        examples = {image.reason.partition(":")[0]: image.path for image in reversed(survey.bad)}
        found = [(reason, count, examples[reason]) for reason, count in reasons.most_common(SHOWN)]
        parts.append(_table("Images that cannot be read", ("reason", "images", "such as"), found))
    if len(survey.classes) > 1:
        rows = [tuple(row.values()) for row in survey.classes.slice(0, SHOWN).to_pylist()]
        parts.append(_table("Classes, the largest first", ("class", "images", "train", "val", "test"), rows))
    for title, table in (
        ("The same content in several splits: what is measured was trained on", survey.leaks),
        ("The same content in several classes: one label is wrong", survey.contradictions),
        ("The same content several times", survey.copies),
    ):
        if len(table):
            rows = [tuple(row.values())[1:] for row in table.slice(0, SHOWN).to_pylist()]
            parts.append(_table(f"{title} ({len(table)} images)", ("path", "class", "split"), rows))
    if survey.odd:
        rows = [(image["path"], image["why"]) for image in survey.odd]
        parts.append(_table("The oddest images", ("path", "why"), rows))
    return [*parts, "\n".join(_advice(survey))]


def _overview(survey: Survey, root: Path) -> Group:
    table = survey.index.table
    splits = {row["values"]: row["counts"] for row in table["split"].value_counts().to_pylist()}
    endings = Counter(path.rpartition(".")[2].lower() for path in pc.unique(_endings(table)).to_pylist())
    rows = [
        ("images", f"{len(table):,}"),
        ("splits", ", ".join(f"{split} {splits[split]:,}" for split in ("train", "val", "test") if splits.get(split))),
        ("classes", _class_words(survey.classes)),
        ("formats", ", ".join(sorted(endings))),
        ("bytes", f"{pc.sum(table['size']).as_py() / 1e6:,.1f} MB"),
        *((side, _spread(table[side])) for side in ("width", "height")),
        ("cannot be read", f"{len(survey.bad):,}"),
        ("copies", f"{int(survey.metrics['data/copies']):,}"),
        ("leaked", f"{int(survey.metrics['data/leaked']):,} images of val and test are trained on"),
    ]
    return _table(f"Data set {root.name}", ("", ""), rows)


def _endings(table: pa.Table) -> pa.Array:
    return pc.replace_substring_regex(table["path"], pattern=r".*\.", replacement=".")


def _class_words(classes: pa.Table) -> str:
    named = classes.filter(pc.not_equal(classes["class_name"], ""))
    if not len(named):
        return "none"
    largest, smallest = (named["images"][row].as_py() for row in (0, len(named) - 1))
    return f"{len(named):,}, of {smallest:,} to {largest:,} images (1 : {largest / smallest:.1f})"


def _spread(pixels: pa.ChunkedArray) -> str:
    low, middle, high = pc.quantile(pixels, q=[0, 0.5, 1], interpolation="lower").to_pylist()
    return f"{low} to {high} px, median {middle}"


def _advice(survey: Survey) -> list[str]:
    advice = []
    if survey.bad:
        advice.append(f"-> {len(survey.bad)} images stop a training, unless datamodule.on_bad_image=skip or replace")
    if len(survey.leaks):
        advice.append("-> remove the copies, or give the splits by files (datamodule.test_split_file, ...)")
    if len(survey.contradictions):
        advice.append("-> look at the images that are in several classes; datamodule.class_from may name them wrongly")
    if len(survey.index.split("train")) < 256:
        advice.append("-> fewer than 256 training images: lower datamodule.batch_size")
    return advice or ["-> nothing stands in the way of a training"]


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Group:
    table = Table(*heads, show_header=any(heads))
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return Group(title, table)


def write_report(survey: Survey, report: str, folder: Path) -> None:
    """Write the report, and tables of all that was found, into a folder.

    Raises:
        InputError: if that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.txt").write_text(report, encoding="utf-8")
        BadImageList(folder / "bad_images.csv").start(survey.bad)
        csv.write_csv(survey.classes, folder / "classes.csv")
        for name in ("copies", "leaks", "contradictions"):
            csv.write_csv(getattr(survey, name), folder / f"{name}.csv")
        odd = pa.Table.from_pylist(
            survey.odd, schema=pa.schema({"path": pa.string(), "why": pa.string(), "deviations": pa.float64()})
        )
        csv.write_csv(odd, folder / "oddest.csv")
    except OSError as error:
        raise InputError(f"report must be a folder that can be written, got {folder}: {error.strerror}") from error
