"""Classification by the nearest neighbours of an embedding.

``N`` embeddings with known classes are the bank, ``Q`` are asked, all in ``D`` dimensions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Predictions(NamedTuple):
    """Classes of the queries, each of shape ``(Q,)``: by majority, and with votes weighted by similarity."""

    majority: Tensor
    weighted: Tensor


@torch.no_grad()
def knn_predict(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    num_neighbours: int = 20,
    temperature: float = 0.1,
    chunk_size: int = 1024,
) -> Predictions:
    r"""Classify each query by its nearest bank entries in cosine distance.

    A neighbour of similarity :math:`s` has one vote, or :math:`\exp(s / T)` votes where they are weighted. The
    smaller class wins a draw.

    Args:
        queries: shape ``(Q, D)``.
        bank: shape ``(N, D)``.
        labels: class of each bank entry, shape ``(N,)``, integers from 0.
        num_neighbours: how many vote, at most ``N``.
        temperature: ``T`` of the weighted vote, above 0; similarities lie in [-1, 1].
        chunk_size: queries compared at once; bounds memory at ``chunk_size * N`` similarities.

    Raises:
        ValueError: if ``num_neighbours`` is not in 1..N.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_predict(torch.tensor([[2.0, 0.1]]), bank, torch.tensor([0, 0, 1]), num_neighbours=2).majority
        tensor([0])

    References:
        Wu et al. 2018, arXiv:1805.01978, sec. 3.4 (the weighted vote).
    """
    if not 1 <= num_neighbours <= len(bank):
        raise ValueError(f"num_neighbours must be between 1 and the bank size {len(bank)}, got {num_neighbours}")
    bank = F.normalize(bank.float(), dim=1)
    num_classes = int(labels.max()) + 1
    chunks = [
        _vote(F.normalize(chunk.float(), dim=1) @ bank.T, labels, num_classes, num_neighbours, temperature)
        for chunk in torch.split(queries, chunk_size)
    ]
    return Predictions(*(torch.cat(votes) for votes in zip(*chunks, strict=True)))


def _vote(similarity: Tensor, labels: Tensor, num_classes: int, num_neighbours: int, temperature: float) -> Predictions:
    nearest, index = similarity.topk(num_neighbours, dim=1)  # (Q, K)
    classes = labels[index]  # (Q, K)
    empty = torch.zeros(len(similarity), num_classes, device=similarity.device)
    counts = empty.scatter_add(1, classes, torch.ones_like(nearest))  # (Q, classes)
    # the largest similarity becomes exp(0): no overflow however small the temperature
    weights = ((nearest - nearest[:, :1]) / temperature).exp()
    weighted = empty.scatter_add(1, classes, weights)
    return Predictions(counts.argmax(1), weighted.argmax(1))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of ``predicted`` that equals ``labels``, both of shape ``(Q,)``.

    Example:
        >>> accuracy(torch.tensor([0, 1]), torch.tensor([0, 0]))
        0.5
    """
    return (predicted == labels).double().mean().item()
