"""Which classes are taken for which: the confusion matrix of ``C`` classes and what it says of each."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClassTable(NamedTuple):
    """What holds for each class, every tensor of shape ``(C,)``.

    Attributes:
        support: queries of the class, integers.
        precision: share right of what was called so, in [0, 1].
        recall: share found of the class, in [0, 1].
        f1: harmonic mean of both, in [0, 1].
    """

    support: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor


class ConfusedPair(NamedTuple):
    """How many queries of the class ``label`` were called ``predicted``."""

    label: int
    predicted: int
    num_queries: int


def confusion_matrix(labels: Tensor, predicted: Tensor, *, num_classes: int | None = None) -> Tensor:
    """Count how often each class is called what.

    Args:
        labels: true classes, shape ``(Q,)``, integers from 0.
        predicted: classes said, shape ``(Q,)``.
        num_classes: ``C``; by default up to the largest class that occurs.

    Returns:
        Counts of shape ``(C, C)``: a row per true class, a column per class said.

    Raises:
        ValueError: if the shapes differ, or a class is not in 0..C-1.

    Example:
        >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
        tensor([[1, 1],
                [0, 1]])
    """
    if labels.shape != predicted.shape or labels.ndim != 1:
        raise ValueError(
            f"labels and predicted must have one shape (Q,), got {tuple(labels.shape)} and {tuple(predicted.shape)}"
        )
    both = torch.stack([labels.long(), predicted.long()])  # (2, Q)
    largest = int(both.max()) if both.numel() else -1
    num_classes = largest + 1 if num_classes is None else num_classes
    if largest >= num_classes or (both < 0).any():
        raise ValueError(
            f"labels and predicted must be classes in 0..{num_classes - 1}, got {int(both.min())} to {largest}"
        )
    counts = torch.bincount(both[0] * num_classes + both[1], minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def class_table(confusion: Tensor) -> ClassTable:
    r"""Return support, precision, recall and F1 of each class.

    .. math::
        P_c = \frac{M_{cc}}{\sum_r M_{rc}}, \quad R_c = \frac{M_{cc}}{\sum_k M_{ck}}, \quad
        F_c = \frac{2 M_{cc}}{\sum_r M_{rc} + \sum_k M_{ck}}

    A share of nothing is 0: the precision of a class never said, the recall of one that does not occur.

    Args:
        confusion: counts :math:`M` of shape ``(C, C)``, a row per true class.

    Returns:
        The support as integers, the shares in float64.

    Raises:
        ValueError: if ``confusion`` is not square.

    Example:
        >>> class_table(torch.tensor([[1, 1], [0, 2]])).recall
        tensor([0.5000, 1.0000], dtype=torch.float64)

    References:
        van Rijsbergen 1979, "Information retrieval", chap. 7.
    """
    _check_square(confusion)
    right, said, support = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    return ClassTable(support, _share(right, said), _share(right, support), _share(2 * right, said + support))


def macro_f1(confusion: Tensor) -> float:
    """Return the mean F1 of the classes that occur, or are said, however many images each has.

    Args:
        confusion: counts of shape ``(C, C)``, a row per true class.

    Returns:
        A share in [0, 1]; not a number without any image.

    Raises:
        ValueError: if ``confusion`` is not square.

    Example:
        >>> macro_f1(torch.tensor([[2, 0, 0], [1, 1, 0], [0, 0, 0]]))  # 4/5 and 2/3
        0.7333333333333334

    References:
        Opitz & Burst 2019, arXiv:1911.03347 (the mean of F1, not the F1 of means).
    """
    f1 = class_table(confusion).f1
    there = (confusion.sum(0) + confusion.sum(1)) > 0
    return float(f1[there].mean())


def most_confused(confusion: Tensor, num_pairs: int = 10) -> list[ConfusedPair]:
    """Return the mistakes made most often, the most frequent first; of equals, the smaller true class.

    Args:
        confusion: counts of shape ``(C, C)``, a row per true class.
        num_pairs: how many pairs at most; pairs never confused are left out.

    Raises:
        ValueError: if ``confusion`` is not square.

    Example:
        >>> most_confused(torch.tensor([[9, 1], [3, 7]]))
        [ConfusedPair(label=1, predicted=0, num_queries=3), ConfusedPair(label=0, predicted=1, num_queries=1)]
    """
    _check_square(confusion)
    mistakes = confusion - confusion.diagonal().diag()
    counts, places = mistakes.flatten().sort(descending=True, stable=True)
    pairs = zip(places[:num_pairs].tolist(), counts[:num_pairs].tolist(), strict=True)
    return [ConfusedPair(place // len(confusion), place % len(confusion), count) for place, count in pairs if count]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.clamp(min=1)  # where the whole is 0, so is the part


def _check_square(confusion: Tensor) -> None:
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion must have the shape (C, C), got {tuple(confusion.shape)}")
