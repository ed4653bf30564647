"""Which images are taken for which class, as tables, a picture, and a page that shows the worst."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import csv
from torch import Tensor

from mlflow_ssl.evaluation.scores import by_class, confusions
from mlflow_ssl.pictures.confusion import confusion_matrix
from mlflow_ssl.pictures.sheet import Shown, sheet_html
from mlflow_ssl.tasks.search import inside

MOST_SHOWN = 12
"""Images of a confusion on the page."""


def write_classes(
    folder: Path,
    truth: Tensor,
    predicted: Tensor,
    classes: Sequence[str],
    paths: pa.ChunkedArray,
    root: Path,
    title: str,
) -> None:
    """Write ``classes.csv``, ``confusion_matrix.png``, ``worst_confused.html`` and, of mistakes, ``confusions.csv``.

    Args:
        folder: where to; it exists.
        truth: class of each image, shape ``(N,)``.
        predicted: what it was taken for, shape ``(N,)``.
        classes: names.
        paths: of the images, relative to ``root``, shape ``(N,)``.
        root: the data folder.
        title: of the page.
    """
    csv.write_csv(pa.Table.from_pylist(by_class(predicted, truth, classes)), folder / "classes.csv")
    confusion_matrix(truth, predicted, classes).save(folder / "confusion_matrix.png")
    pairs = confusions(predicted, truth, classes)
    if pairs:
        csv.write_csv(pa.Table.from_pylist(pairs), folder / "confusions.csv")
    sections = []
    for pair in pairs:
        true, said = classes.index(str(pair["class_name"])), classes.index(str(pair["predicted"]))
        rows = ((truth == true) & (predicted == said)).nonzero().flatten()[:MOST_SHOWN].tolist()
        shown = [Shown(inside(root, path), path) for path in (paths[row].as_py() for row in rows)]
        sections.append((f"{pair['class_name']} taken for {pair['predicted']}: {pair['images']} images", [shown]))
    (folder / "worst_confused.html").write_text(sheet_html(title, sections), encoding="utf-8")
