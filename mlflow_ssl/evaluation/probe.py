"""A linear classifier of embeddings: multinomial logistic regression, fitted to its optimum on any device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in (-4, -3, -2, -1, 0, 1, 2))
"""Inverse regularizations that are tried, the strongest regularization first."""


class LinearClassifier(NamedTuple):
    """Logits of an embedding ``x`` are ``weight @ (x - mean) / deviation + bias``.

    Attributes:
        mean: of each dimension of the embeddings that it was fitted on, ``(D,)``.
        deviation: likewise, 1 where nothing varies.
        weight: ``(C, D)``.
        bias: ``(C,)``.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return the logits ``(N, C)`` of embeddings ``(N, D)``."""
        standard = (embeddings.to(self.weight) - self.mean) / self.deviation
        return standard @ self.weight.T + self.bias

    def predict(self, embeddings: Tensor) -> Tensor:
        """Return the likeliest class of each embedding ``(N, D)``, shape ``(N,)``."""
        return self.logits(embeddings).argmax(1)


class Probe(NamedTuple):
    """A classifier, the inverse regularization it was fitted with, and its accuracy on the validation embeddings."""

    classifier: LinearClassifier
    strength: float
    val_accuracy: float


def fit_linear(
    embeddings: Tensor,
    labels: Tensor,
    *,
    strength: float = 1.0,
    num_classes: int | None = None,
    start: LinearClassifier | None = None,
    max_iterations: int = 500,
) -> LinearClassifier:
    r"""Fit a logistic regression on standardized embeddings.

    It minimizes, as scikit-learn's ``LogisticRegression`` does,

    .. math:: C \sum_i -\log p(y_i \mid x_i) + \tfrac{1}{2} \lVert W \rVert^2

    by L-BFGS with a strong-Wolfe line search, in double precision. Of more dimensions than embeddings, only the
    space that the embeddings span is searched: the best weights lie in it, and L-BFGS takes the same way there.

    Args:
        embeddings: shape ``(N, D)``.
        labels: classes, ``(N,)``, integers from 0.
        strength: :math:`C`, inverse regularization, above 0.
        num_classes: by default up to the largest class that occurs.
        start: where to begin, such as the fit for a neighbouring ``strength``.
        max_iterations: at most.

    Raises:
        ValueError: if there is no embedding, or ``strength`` is not above 0.

    References:
        Liu and Nocedal 1989, doi:10.1007/BF01589116; Kimeldorf and Wahba 1971, doi:10.1016/0022-247X(71)90184-3 (that
        the best weights are sums of embeddings).
    """
    if not len(embeddings) or not strength > 0:
        raise ValueError(f"there must be embeddings, and strength above 0, got {len(embeddings)} and {strength}")
    standard = _standardized(embeddings, labels)
    return _fit(standard, strength=strength, num_classes=num_classes, start=start, max_iterations=max_iterations)


class _Standardized(NamedTuple):
    """Embeddings to fit on: mean 0 and deviation 1 in each dimension, then in coordinates of the space they span.

    Attributes:
        points: shape ``(N, R)``.
        labels: ``(N,)``.
        mean: of each dimension before, ``(D,)``.
        deviation: likewise, 1 where nothing varies.
        basis: orthonormal, ``(D, R)``; None for all dimensions as they are.
    """

    points: Tensor
    labels: Tensor
    mean: Tensor
    deviation: Tensor
    basis: Tensor | None


def _standardized(embeddings: Tensor, labels: Tensor) -> _Standardized:
    points = embeddings.double()
    mean, deviation = points.mean(0), points.std(0, correction=0)
    deviation = torch.where(deviation > 1e-12, deviation, 1.0)
    points = (points - mean) / deviation
    if len(points) >= points.shape[1]:
        return _Standardized(points, labels, mean, deviation, None)
    squares, left = torch.linalg.eigh(points @ points.T)  # (N,), (N, N)
    spanned = squares > squares[-1] * len(points) * torch.finfo(squares.dtype).eps
    lengths, left = squares[spanned].sqrt(), left[:, spanned]
    return _Standardized(left * lengths, labels, mean, deviation, points.T @ left / lengths)


def _fit(
    given: _Standardized,
    *,
    strength: float,
    num_classes: int | None,
    start: LinearClassifier | None,
    max_iterations: int,
) -> LinearClassifier:
    count = int(given.labels.max()) + 1 if num_classes is None else num_classes
    points, basis = given.points, given.basis
    if start is None:
        weight, bias = points.new_zeros(count, points.shape[1]), points.new_zeros(count)
    else:
        weight, bias = start.weight.clone() if basis is None else start.weight @ basis, start.bias.clone()
    _minimize(points, given.labels, weight, bias, penalty=0.5 / (strength * len(points)), max_iterations=max_iterations)
    return LinearClassifier(given.mean, given.deviation, weight if basis is None else weight @ basis.T, bias)


def _minimize(
    points: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, *, penalty: float, max_iterations: int
) -> None:
    """Move weight and bias, in place, to where the mean cross-entropy and the penalty are least."""
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        parameters,
        max_iter=max_iterations,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(points @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    for parameter in parameters:
        parameter.detach_()


def linear_probe(
    embeddings: Tensor,
    labels: Tensor,
    val_embeddings: Tensor,
    val_labels: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """Fit a linear classifier whose regularization is chosen on validation embeddings.

    Each fit begins where that of the next stronger regularization ended; of equal accuracies the stronger
    regularization wins.

    Args:
        embeddings: to fit on, shape ``(N, D)``.
        labels: their classes, ``(N,)``, integers from 0.
        val_embeddings: to choose by, shape ``(M, D)``.
        val_labels: their classes, ``(M,)``.
        strengths: inverse regularizations to try.

    Raises:
        ValueError: if there is nothing to fit on, or to choose by.
    """
    if not len(val_labels):
        raise ValueError("val_embeddings must be at least one: the regularization is chosen by them")
    if not len(embeddings):
        raise ValueError("embeddings must be at least one")
    num_classes = int(max(labels.max(), val_labels.max())) + 1
    standard = _standardized(embeddings, labels)
    best: Probe | None = None
    classifier: LinearClassifier | None = None
    for strength in sorted(strengths):
        classifier = _fit(standard, strength=strength, num_classes=num_classes, start=classifier, max_iterations=100)
        accuracy = float((classifier.predict(val_embeddings) == val_labels).double().mean())
        if best is None or accuracy > best.val_accuracy:
            best = Probe(classifier, strength, accuracy)
    if best is None:
        raise ValueError("strengths must name at least one")
    return best
