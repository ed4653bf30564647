"""Losses between embeddings of ``B`` images in ``D`` dimensions."""

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
