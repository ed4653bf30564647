"""What is taken for what: predictions against the truth, class by class."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mlflow_ssl.pictures.style import INK, draw, new_axes, plain_text, shorten

MAX_NUMBERS, MAX_NAMES = 20, 50
"""Classes up to which the cells hold their counts, and up to which the axes hold the names."""


class ClassResult(NamedTuple):
    """How one class fared; ``accuracy`` is ``right / images``, in [0, 1], and None without images."""

    class_name: str
    images: int
    right: int
    accuracy: float | None


def count_confusions(truth: Tensor, predicted: Tensor, num_classes: int) -> npt.NDArray[np.int64]:
    """Return how often the class of a row was taken for that of a column, shape ``(C, C)``.

    Args:
        truth: class of each image, shape ``(N,)``, integers from 0.
        predicted: likewise.
        num_classes: ``C``.

    Example:
        >>> count_confusions(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    counts = torch.bincount(truth.long() * num_classes + predicted.long(), minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).numpy()


def confusion_matrix(truth: Tensor, predicted: Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw the share of each class that was taken for each class.

    Args:
        truth: class of each image, shape ``(N,)``, integers from 0.
        predicted: likewise.
        classes: name of each class; above 50 they are not written.
    """
    counts = count_confusions(truth, predicted, len(classes))
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    size = min(4.5 + 0.42 * len(classes), 13)
    figure, axes = new_axes(size + 0.8, size)
    cells = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(cells, label="share of the true class", shrink=0.8, pad=0.02)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"{counts.sum():,} images, {accuracy:.1%} right", loc="left", fontsize=12, color=INK)
    if len(classes) <= MAX_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.5 else INK if count else "#bbbbbb"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=9, color=ink)
    names = [plain_text(shorten(name, lambda text: len(text) <= 24)) for name in classes]
    ticks = range(len(classes)) if len(classes) <= MAX_NAMES else ()
    axes.set_xticks(ticks, names if ticks else (), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names if ticks else ())
    axes.spines[:].set_visible(False)
    return draw(figure)


def per_class_table(truth: Tensor, predicted: Tensor, classes: Sequence[str]) -> list[ClassResult]:
    """Return how each class fared, in the order of ``classes``.

    Args:
        truth: class of each image, shape ``(N,)``, integers from 0.
        predicted: likewise.
        classes: name of each class.

    Example:
        >>> per_class_table(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), ["cat", "dog"])[0]
        ClassResult(class_name='cat', images=2, right=1, accuracy=0.5)
    """
    counts = count_confusions(truth, predicted, len(classes))
    table = zip(classes, counts.sum(1).tolist(), counts.diagonal().tolist(), strict=True)
    return [ClassResult(name, images, right, right / images if images else None) for name, images, right in table]


def per_class_csv(table: Sequence[ClassResult]) -> str:
    """Return a table as CSV text with the header ``class,images,right,accuracy``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "images", "right", "accuracy"])
    for row in table:
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.6f}"
        writer.writerow([row.class_name, row.images, row.right, accuracy])
    return text.getvalue()
