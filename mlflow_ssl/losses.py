"""Losses of ``B`` images: between embeddings in ``D`` dimensions, and of ``C`` classes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def byol_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    r"""Return the squared distance between unit-length rows.

    .. math:: \ell_b = 2 - 2 \cos(p_b, z_b) \in [0, 4]

    Args:
        prediction: online predictor output, shape ``(B, D)``.
        projection: target projector output, shape ``(B, D)``; receives no gradient.

    Returns:
        One loss per image, shape ``(B,)``, without unit.

    Raises:
        ValueError: if the two shapes differ.

    Example:
        >>> import torch
        >>> byol_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
        tensor([2.])

    References:
        Grill et al. 2020, arXiv:2006.07733, eq. 2.
    """
    if prediction.shape != projection.shape:
        raise ValueError(
            "prediction and projection must have one shape, got "
            f"{tuple(prediction.shape)} and {tuple(projection.shape)}"
        )
    return 2 - 2 * F.cosine_similarity(prediction, projection.detach(), dim=-1)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Return the mean cross entropy of the images that have a class, each as heavy as its class.

    .. math:: \ell = \frac{\sum_b w_{y_b} \ell_b}{\sum_b w_{y_b}}, \qquad
        \ell_b = -\log \mathrm{softmax}(x_b)_{y_b}

    Args:
        logits: shape ``(B, C)``.
        labels: classes, shape ``(B,)``, integers; one below 0 is none, and its image is left out.
        class_weights: weight :math:`w` of each class, above 0; by default 1.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).

    Returns:
        A number, without unit; 0 where no image has a class.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -1]))  # log 4, of the one image
        tensor(1.3863)

    References:
        Smoothing: Szegedy et al. 2016, arXiv:1512.00567, sec. 7.
    """
    weights = logits.new_ones(logits.shape[1]) if class_weights is None else logits.new_tensor(class_weights)
    known = labels >= 0
    labels = labels.clamp(min=0)
    losses = F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=label_smoothing)  # (B,)
    return (losses * known).sum() / (weights[labels] * known).sum().clamp(min=torch.finfo(logits.dtype).tiny)


def balanced_weights(counts: Sequence[int]) -> list[float]:
    r"""Return weights by which all classes together weigh the same, and an image 1 on average.

    .. math:: w_c = N / (C n_c)

    Args:
        counts: images :math:`n_c` of each class; a class without images weighs 1.

    Example:
        >>> balanced_weights([30, 10])
        [0.6666666666666666, 2.0]

    References:
        King & Zeng 2001, "Logistic regression in rare events data", sec. 4.2.
    """
    return [sum(counts) / (len(counts) * count) if count else 1.0 for count in counts]
