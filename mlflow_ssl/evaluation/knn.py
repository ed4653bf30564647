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


class Neighbours(NamedTuple):
    """Nearest bank entries of the queries, closest first: cosines and places in the bank, each ``(Q, K)``."""

    similarities: Tensor
    indices: Tensor


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, num_neighbours: int, *, chunk_size: int = 1024) -> Neighbours:
    """Find the nearest bank entries of each query in cosine distance.

    Args:
        queries: shape ``(Q, D)``.
        bank: shape ``(N, D)``.
        num_neighbours: ``K``, at most ``N``.
        chunk_size: queries compared at once; bounds memory at ``chunk_size * N`` similarities.

    Raises:
        ValueError: if ``num_neighbours`` is not in 1..N.

    Example:
        >>> bank = torch.tensor([[0.0, 1.0], [0.9, 0.1], [1.0, 0.0]])
        >>> nearest(torch.tensor([[2.0, 0.0]]), bank, 2).indices
        tensor([[2, 1]])
    """
    if not 1 <= num_neighbours <= len(bank):
        raise ValueError(f"num_neighbours must be between 1 and the bank size {len(bank)}, got {num_neighbours}")
    bank = F.normalize(bank.float(), dim=1)
    chunks = [
        (F.normalize(chunk.float(), dim=1) @ bank.T).topk(num_neighbours, dim=1)
        for chunk in torch.split(queries, chunk_size)
    ]
    return Neighbours(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


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
    found = nearest(queries, bank, num_neighbours, chunk_size=chunk_size)
    num_classes = int(labels.max()) + 1
    chunks = [
        _vote(similarities, labels[indices], num_classes, temperature)
        for similarities, indices in zip(*(torch.split(part, chunk_size) for part in found), strict=True)
    ]
    return Predictions(*(torch.cat(votes) for votes in zip(*chunks, strict=True)))


def _vote(similarities: Tensor, classes: Tensor, num_classes: int, temperature: float) -> Predictions:
    """Count the votes of neighbours whose similarities and classes are ``(Q, K)``."""
    empty = torch.zeros(len(classes), num_classes, device=similarities.device)
    counts = empty.scatter_add(1, classes, torch.ones_like(similarities))  # (Q, classes)
    # the largest similarity becomes exp(0): no overflow however small the temperature
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    weighted = empty.scatter_add(1, classes, weights)
    return Predictions(counts.argmax(1), weighted.argmax(1))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of ``predicted`` that equals ``labels``, both of shape ``(Q,)``.

    Example:
        >>> accuracy(torch.tensor([0, 1]), torch.tensor([0, 0]))
        0.5
    """
    return (predicted == labels).double().mean().item()
