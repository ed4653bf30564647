"""How far a measured number may lie from the true one: confidence intervals of means over ``Q`` queries."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Interval(NamedTuple):
    """A number, and the bounds that hold the true one with the confidence asked for; all in the number's unit."""

    value: float
    low: float
    high: float


def student_interval(values: Tensor, *, confidence: float = 0.95) -> Interval:
    r"""Return the mean of a few repetitions, as over seeds, with Student's interval.

    .. math:: \bar x \pm t_{n-1,\,(1+\gamma)/2}\; s / \sqrt n

    Args:
        values: one number per repetition, shape ``(n,)``; two or more.
        confidence: :math:`\gamma`, between 0 and 1.

    Raises:
        ValueError: if there are fewer than two values, one is not finite, or ``confidence`` is not between 0 and 1.

    Example:
        >>> [round(number, 3) for number in student_interval(torch.tensor([0.5, 0.6, 0.7]))]
        [0.6, 0.352, 0.848]

    References:
        Student 1908, "The probable error of a mean", Biometrika 6(1).
    """
    from scipy.special import stdtrit

    numbers = _checked(values, confidence)
    if len(numbers) < 2:
        raise ValueError(f"values must be at least 2 to know their spread, got {len(numbers)}; add seeds")
    mean = float(numbers.mean())
    quantile = float(stdtrit(len(numbers) - 1, (1 + confidence) / 2))
    margin = quantile * float(numbers.std(ddof=1)) / len(numbers) ** 0.5
    return Interval(mean, mean - margin, mean + margin)


def bootstrap_mean(
    values: Tensor, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0, chunk_size: int = 2**20
) -> Interval:
    """Return the mean of one value per query, with the percentile interval of the bootstrap.

    A resample is ``Q`` draws with replacement; how often it holds each different value is one multinomial draw. So
    values that are only right or wrong cost the same for any ``Q``.

    Args:
        values: shape ``(Q,)``, as average precisions, or 1 where a prediction is right and 0 elsewhere.
        confidence: share of such intervals that hold the true mean, between 0 and 1.
        num_resamples: how often to draw.
        seed: of the draws.
        chunk_size: counts in memory at once.

    Raises:
        ValueError: if there is no value, one is not finite, or ``confidence`` is not between 0 and 1.

    Example:
        >>> [round(number, 2) for number in bootstrap_mean(torch.tensor([1.0] * 80 + [0.0] * 20))]
        [0.8, 0.72, 0.88]

    References:
        Efron and Tibshirani 1993, "An introduction to the bootstrap", sec. 13.3.
    """
    numbers = _checked(values, confidence)
    different, counts = np.unique(numbers, return_counts=True)
    rng = np.random.default_rng(seed)
    step = max(1, chunk_size // len(different))
    sizes = [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
    means = np.concatenate(
        [rng.multinomial(len(numbers), counts / len(numbers), size=size) @ different for size in sizes]
    ) / len(numbers)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(numbers.mean()), float(low), float(high))


def bootstrap_accuracy(
    predicted: Tensor, labels: Tensor, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the share of ``predicted`` that equals ``labels``, both ``(Q,)``, with its bootstrap interval.

    Args:
        predicted: classes said, integers.
        labels: true classes.
        confidence: as in :func:`bootstrap_mean`.
        num_resamples: how often to draw.
        seed: of the draws.

    Raises:
        ValueError: if the shapes differ, or :func:`bootstrap_mean` refuses.

    Example:
        >>> bootstrap_accuracy(torch.tensor([1, 1]), torch.tensor([1, 1]))
        Interval(value=1.0, low=1.0, high=1.0)
    """
    _check_one_shape("predicted", predicted, "labels", labels)
    return bootstrap_mean(predicted == labels, confidence=confidence, num_resamples=num_resamples, seed=seed)


def bootstrap_difference(
    first: Tensor, second: Tensor, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return by how much the mean of ``first`` exceeds that of ``second``, two models on the same queries.

    Each resample has the same queries for both, so what makes a query hard for both cancels out. Where the interval
    holds 0, the queries are too few to tell the models apart.

    Args:
        first: one value per query, shape ``(Q,)``, as 1 where the first model is right and 0 elsewhere.
        second: of the second model, in the same order of queries.
        confidence: as in :func:`bootstrap_mean`.
        num_resamples: how often to draw.
        seed: of the draws.

    Raises:
        ValueError: if the shapes differ, or :func:`bootstrap_mean` refuses.

    Example:
        >>> bootstrap_difference(torch.tensor([0.5, 0.25]), torch.tensor([0.25, 0.0]))
        Interval(value=0.25, low=0.25, high=0.25)

    References:
        Koehn 2004, "Statistical significance tests for machine translation evaluation", sec. 4 (the paired draw).
    """
    _check_one_shape("first", first, "second", second)
    difference = first.detach().double() - second.detach().double()
    return bootstrap_mean(difference, confidence=confidence, num_resamples=num_resamples, seed=seed)


def _check_one_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, got {tuple(tensor.shape)} and {tuple(other.shape)}"
        )


def _checked(values: Tensor, confidence: float) -> np.ndarray:
    """Return the values in double precision, or refuse them."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must have the shape (Q,), got {tuple(values.shape)}")
    numbers: np.ndarray = values.detach().cpu().to(torch.float64).numpy()
    if not np.isfinite(numbers).all():
        raise ValueError(f"values must be finite, got {np.count_nonzero(~np.isfinite(numbers))} that are not")
    return numbers
