"""All that is said of a network's embeddings: one table of figures, each with the interval that noise leaves it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlflow_ssl.evaluation.confusion import class_table, confusion_matrix, most_confused
from mlflow_ssl.evaluation.health import rankme
from mlflow_ssl.evaluation.intervals import Interval, bootstrap_accuracy, bootstrap_difference
from mlflow_ssl.evaluation.knn import knn_sweep

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
RANKED = 4096
"""Embeddings that the rank is of, at most, evenly taken."""


@dataclass(frozen=True)
class Labelled:
    """Embeddings ``(N, D)``, and the class of each, ``(N,)``, integers from 0."""

    embeddings: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of embeddings."""
        return len(self.labels)


@dataclass(frozen=True)
class Scores:
    """What embeddings are worth.

    Attributes:
        figures: by name, such as ``knn_20``; the bounds are those of 95 % confidence.
        predicted: classes of the queries by the way of classifying that has the figure's name, ``(Q,)`` each.
    """

    figures: dict[str, Interval] = field(default_factory=dict)
    predicted: dict[str, Tensor] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The figures as a run has them: each with ``_low`` and ``_high`` where it has bounds."""
        named: dict[str, float] = {}
        for name, (value, low, high) in self.figures.items():
            named[name] = value
            if low != high:
                named |= {f"{name}_low": low, f"{name}_high": high}
        return named


def score(bank: Labelled, queries: Labelled, *, temperature: float = 0.1, seed: int = 0) -> Scores:
    """Measure embeddings by their neighbours and by their rank.

    Args:
        bank: with known classes; where it is empty, only the rank is measured.
        queries: whose classes are asked for.
        temperature: of the weighted vote.
        seed: of the bootstrap.

    Returns:
        ``knn_K`` and ``knn_K_weighted`` for each number of neighbours up to the size of the bank, and ``rankme``.

    Raises:
        ValueError: if there are no queries.
    """
    if not len(queries):
        raise ValueError("queries must be at least one")
    scores = Scores()
    if len(bank):
        swept = knn_sweep(
            queries.embeddings, bank.embeddings, bank.labels, neighbours=NEIGHBOURS, temperature=temperature
        )
        for count, votes in swept.items():
            scores.predicted[f"knn_{count}"] = votes.majority
            scores.predicted[f"knn_{count}_weighted"] = votes.weighted
    for name, predicted in scores.predicted.items():
        scores.figures[name] = bootstrap_accuracy(predicted, queries.labels, seed=seed)
    rank = rankme(evenly(queries.embeddings, RANKED))
    scores.figures["rankme"] = Interval(rank, rank, rank)
    return scores


def compare(scores: Mapping[str, Scores], labels: Tensor, *, seed: int = 0) -> dict[str, dict[str, Interval]]:
    """Return by how much the first of some networks exceeds each other, figure by figure, on the same queries.

    Args:
        scores: by network.
        labels: true classes of the queries, ``(Q,)``.
        seed: of the bootstrap.
    """
    (_, first), *others = scores.items()
    return {
        name: {
            figure: bootstrap_difference(
                (predicted == labels).float(), (other.predicted[figure] == labels).float(), seed=seed
            )
            for figure, predicted in first.predicted.items()
            if figure in other.predicted
        }
        for name, other in others
    }


def by_class(predicted: Tensor, labels: Tensor, classes: Sequence[str]) -> list[dict[str, object]]:
    """Return a row for each class: its name, images, precision, recall and F1, all shares in [0, 1]."""
    table = class_table(confusion_matrix(labels, predicted, num_classes=len(classes)))
    columns = zip(classes, *(part.tolist() for part in table), strict=True)
    return [
        {"class_name": name, "images": support, "precision": precision, "recall": recall, "f1": f1}
        for name, support, precision, recall, f1 in columns
    ]


def confusions(predicted: Tensor, labels: Tensor, classes: Sequence[str], *, most: int = 10) -> list[dict[str, object]]:
    """Return the mistakes made most often: ``class_name``, ``predicted`` and how many ``images``."""
    pairs = most_confused(confusion_matrix(labels, predicted, num_classes=len(classes)), most)
    return [
        {"class_name": classes[pair.label], "predicted": classes[pair.predicted], "images": pair.num_queries}
        for pair in pairs
    ]


def evenly(embeddings: Tensor, most: int) -> Tensor:
    """Return at most so many rows, evenly taken."""
    if len(embeddings) <= most:
        return embeddings
    return embeddings[torch.linspace(0, len(embeddings) - 1, most).long()]
