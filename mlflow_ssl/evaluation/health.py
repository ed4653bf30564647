"""What embeddings say of themselves, without labels."""

import torch
from torch import Tensor


def rankme(embeddings: Tensor, *, epsilon: float = 1e-7) -> float:
    r"""Return the effective rank of embeddings: how many directions they spread over.

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \quad p_k = \frac{\sigma_k}{\lVert\sigma\rVert_1} + \epsilon

    where :math:`\sigma` are the singular values. A collapsed network has about 1; the higher, the more a linear
    classifier can tell apart.

    Args:
        embeddings: shape ``(N, D)``; ``N`` should be some times ``D``, as the rank is at most the smaller of both.
        epsilon: keeps the logarithm finite.

    Returns:
        The rank, in [1, min(N, D)], but for the share of ``epsilon``; 0 where all embeddings are 0.

    Raises:
        ValueError: if there is no embedding.

    Example:
        >>> round(rankme(torch.eye(4)), 3), round(rankme(torch.ones(8, 4)), 3)
        (4.0, 1.0)

    References:
        Garrido et al. 2023, arXiv:2210.02885, eq. 1.
    """
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(f"embeddings must have the shape (N, D), got {tuple(embeddings.shape)}")
    values = torch.linalg.svdvals(embeddings.float())
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total + epsilon
    return float(torch.exp(-(shares * shares.log()).sum()))
