"""How far a few labels get."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlflow_ssl.evaluation.intervals import Interval, student_interval
from mlflow_ssl.evaluation.probe import fit_linear

SEEDS = 5


def few_label_rows(
    labels: Tensor, *, per_class: int | None = None, share: float | None = None, seed: int
) -> npt.NDArray[np.int64]:
    """Return rows drawn of each class alike, ascending: at least one of each that occurs.

    Args:
        labels: classes, ``(N,)``, integers from 0.
        per_class: how many of each; all of a class that has no more.
        share: which share of each, above 0 and at most 1; one of the two is given.
        seed: of the draw.

    Raises:
        ValueError: if not exactly one of both is given, or it is out of its bounds.

    Example:
        >>> few_label_rows(torch.tensor([0, 0, 1, 1]), share=1.0, seed=0)
        array([0, 1, 2, 3])
    """
    if (per_class is None) == (share is None):
        raise ValueError("one of per_class and share must be given")
    if (per_class is not None and per_class < 1) or (share is not None and not 0 < share <= 1):
        raise ValueError(f"per_class must be 1 or more, and share in (0, 1], got {per_class} and {share}")
    rng = np.random.default_rng(seed)
    drawn = []
    for number in np.unique(labels.numpy()):
        rows = np.flatnonzero(labels.numpy() == number)
        count = per_class if share is None else max(1, round(share * len(rows)))
        drawn.append(rng.permutation(rows)[:count])
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def few_label_accuracy(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    per_class: int | None = None,
    share: float | None = None,
    num_seeds: int = SEEDS,
) -> Interval:
    """Return the accuracy of linear classifiers that know a few labels, with Student's interval over the draws.

    The regularization is scikit-learn's default, as few labels leave nothing to choose it by.

    Args:
        bank: embeddings that labels are drawn from, ``(N, D)``.
        labels: their classes, ``(N,)``.
        queries: embeddings to classify, ``(Q, D)``.
        query_labels: their classes, ``(Q,)``.
        per_class: see `few_label_rows`.
        share: likewise.
        num_seeds: draws, two or more.
    """
    accuracies = []
    num_classes = int(max(labels.max(), query_labels.max())) + 1
    for seed in range(num_seeds):
        rows = torch.from_numpy(few_label_rows(labels, per_class=per_class, share=share, seed=seed))
        classifier = fit_linear(bank[rows], labels[rows], num_classes=num_classes)
        accuracies.append((classifier.predict(queries) == query_labels).double().mean())
    return student_interval(torch.stack(accuracies))
