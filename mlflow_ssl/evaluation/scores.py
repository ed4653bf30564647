"""All that is said of a network's embeddings: one table of figures, each with the interval that noise leaves it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlflow_ssl.evaluation.confusion import class_table, confusion_matrix, most_confused
from mlflow_ssl.evaluation.few_label import few_label_accuracy
from mlflow_ssl.evaluation.health import rankme
from mlflow_ssl.evaluation.intervals import Interval, bootstrap_accuracy, bootstrap_difference, bootstrap_mean
from mlflow_ssl.evaluation.knn import knn_sweep
from mlflow_ssl.evaluation.probe import linear_probe
from mlflow_ssl.evaluation.retrieval import retrieve

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
FEW_PER_CLASS, FEW_PERCENT = (1, 5), (1, 10)
"""Labels that are known of each class, and shares of them."""
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

    def take(self, rows: Tensor) -> "Labelled":
        """Return some of them."""
        return Labelled(self.embeddings[rows], self.labels[rows])


@dataclass(frozen=True)
class Scores:
    """What embeddings are worth.

    Attributes:
        figures: by name, such as ``knn_20``; the bounds are those of 95 % confidence, not numbers where there are none.
        predicted: classes of the queries by the way of classifying that has the figure's name, ``(Q,)`` each.
    """

    figures: dict[str, Interval] = field(default_factory=dict)
    predicted: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shown(self) -> str | None:
        """The way of classifying that tables of classes are of: the linear classifier, or else the most neighbours."""
        return "linear" if "linear" in self.predicted else next(reversed(self.predicted), None)

    @property
    def metrics(self) -> dict[str, float]:
        """The figures as a run has them: each with ``_low`` and ``_high`` where it has bounds."""
        named: dict[str, float] = {}
        for name, (value, low, high) in self.figures.items():
            named[name] = value
            if not math.isnan(low):
                named |= {f"{name}_low": low, f"{name}_high": high}
        return named


def score(
    bank: Labelled,
    queries: Labelled,
    *,
    val: Labelled | None = None,
    temperature: float = 0.1,
    few_labels: bool = False,
    seed: int = 0,
) -> Scores:
    """Measure embeddings by their neighbours, a linear classifier, what they retrieve, and their rank.

    Args:
        bank: with known classes; where it is empty, only the rank is measured.
        queries: whose classes are asked for.
        val: the linear classifier's regularization is chosen by them; by default by a fifth of the bank, which it is
            then not fitted on.
        temperature: of the weighted vote.
        few_labels: fit linear classifiers on few of the bank's labels, too.
        seed: of the bootstrap and of the fifth.

    Returns:
        ``knn_K`` and ``knn_K_weighted`` for each number of neighbours up to the size of the bank; ``linear``;
        ``retrieval_map`` and ``recall_at_K``; ``few_N_per_class`` and ``few_N_percent``; and ``rankme``.

    Raises:
        ValueError: if there are no queries.
    """
    if not len(queries):
        raise ValueError("queries must be at least one")
    scores = Scores()
    if len(bank):
        _classify(
            scores, bank, queries, val if val is not None and len(val) else None, temperature=temperature, seed=seed
        )
        _retrieve(scores, bank, queries, seed=seed)
        if few_labels:
            _few_labels(scores, bank, queries)
    rank = rankme(evenly(queries.embeddings, RANKED))
    scores.figures["rankme"] = Interval(rank, math.nan, math.nan)
    return scores


def _classify(
    scores: Scores, bank: Labelled, queries: Labelled, val: Labelled | None, *, temperature: float, seed: int
) -> None:
    swept = knn_sweep(queries.embeddings, bank.embeddings, bank.labels, neighbours=NEIGHBOURS, temperature=temperature)
    for count, votes in swept.items():
        scores.predicted[f"knn_{count}"] = votes.majority
        scores.predicted[f"knn_{count}_weighted"] = votes.weighted
    fitted, chosen = (bank, val) if val is not None and len(val) else _held_out(bank, seed=seed)
    if len(fitted) and len(chosen):
        probe = linear_probe(fitted.embeddings, fitted.labels, chosen.embeddings, chosen.labels)
        scores.predicted["linear"] = probe.classifier.predict(queries.embeddings)
    for name, predicted in scores.predicted.items():
        scores.figures[name] = bootstrap_accuracy(predicted, queries.labels, seed=seed)


def _held_out(bank: Labelled, *, seed: int) -> tuple[Labelled, Labelled]:
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))
    fifth = len(bank) // 5
    chosen, fitted = order[:fifth], order[fifth:]
    return bank.take(fitted), bank.take(chosen)


def _retrieve(scores: Scores, bank: Labelled, queries: Labelled, *, seed: int) -> None:
    found = retrieve(queries.embeddings, queries.labels, bank.embeddings, bank.labels)
    there = ~found.average_precision.isnan()
    if there.any():
        scores.figures["retrieval_map"] = bootstrap_mean(found.average_precision[there], seed=seed)
    for k, recall in found.recall.items():
        scores.figures[f"recall_at_{k}"] = bootstrap_mean(recall, seed=seed)


def _few_labels(scores: Scores, bank: Labelled, queries: Labelled) -> None:
    parts = bank.embeddings, bank.labels, queries.embeddings, queries.labels
    for count in FEW_PER_CLASS:
        scores.figures[f"few_{count}_per_class"] = few_label_accuracy(*parts, per_class=count)
    for percent in FEW_PERCENT:
        scores.figures[f"few_{percent}_percent"] = few_label_accuracy(*parts, share=percent / 100)


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


def difference_rows(differences: Mapping[str, Mapping[str, Interval]]) -> list[dict[str, object]]:
    """Return a row for each difference of `compare`.

    Returns:
        ``against`` which network, of which ``figure``, the ``difference`` with ``low`` and ``high``, and whether it
        ``may_be_noise``: its interval holds 0.
    """
    return [
        {
            "against": name,
            "figure": figure,
            "difference": value,
            "low": low,
            "high": high,
            "may_be_noise": low <= 0 <= high,
        }
        for name, figures in differences.items()
        for figure, (value, low, high) in figures.items()
    ]


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
