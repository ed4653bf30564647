"""Classification by the nearest neighbours of an embedding.

``N`` embeddings with known classes are the bank, ``Q`` are asked, all in ``D`` dimensions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 2**29
"""Products of a search that is over sooner than faiss is loaded."""


class Predictions(NamedTuple):
    """Classes of the queries, each of shape ``(Q,)``: by majority, and with votes weighted by similarity."""

    majority: Tensor
    weighted: Tensor


class Neighbours(NamedTuple):
    """Nearest bank entries of the queries, closest first: cosines and places in the bank, each ``(Q, K)``."""

    similarities: Tensor
    indices: Tensor


@torch.no_grad()
def nearest(
    queries: Tensor,
    bank: Tensor,
    num_neighbours: int,
    *,
    chunk_size: int = 1024,
    bank_chunk_size: int = 25000,
    device: torch.device | str | None = None,
) -> Neighbours:
    """Find the nearest bank entries of each query in cosine distance.

    The search is exact. Of entries equally near, the one that stands first in the bank comes first. On a CPU faiss does
    it, which orders what it finds while it multiplies, unless there is little to search.

    Args:
        queries: shape ``(Q, D)``.
        bank: shape ``(N, D)``; may lie elsewhere than the queries, as on the host.
        num_neighbours: ``K``, at most ``N``.
        chunk_size: queries compared at once, on a GPU.
        bank_chunk_size: bank entries compared at once; memory is bounded at ``chunk_size * bank_chunk_size``
            similarities, ``bank_chunk_size * D`` numbers and the queries once more, besides the result.
        device: where to compute, chunk by chunk; by default where the queries lie.

    Returns:
        What was found, where the queries lie.

    Raises:
        ValueError: if ``num_neighbours`` is not in 1..N.

    Example:
        >>> bank = torch.tensor([[0.0, 1.0], [0.9, 0.1], [1.0, 0.0]])
        >>> nearest(torch.tensor([[2.0, 0.0]]), bank, 2).indices
        tensor([[2, 1]])

    References:
        Douze et al. 2024, arXiv:2401.08281 (faiss).
    """
    if not 1 <= num_neighbours <= len(bank):
        raise ValueError(f"num_neighbours must be between 1 and the bank size {len(bank)}, got {num_neighbours}")
    device = queries.device if device is None else torch.device(device)
    unit = _unit(queries, device)
    best = Neighbours(unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.long, device=device))
    with _full_precision():
        for start in range(0, len(bank), bank_chunk_size):
            entries = _unit(bank[start : start + bank_chunk_size], device)
            found = _search(unit, entries, min(num_neighbours, len(entries)), chunk_size)
            best = _merge(best, Neighbours(found.similarities, found.indices + start), num_neighbours)
    return Neighbours(*(part.to(queries.device) for part in best))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Have float32 multiplied as float32, also where the training allows TF32 or bfloat16 for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _unit(embeddings: Tensor, device: torch.device) -> Tensor:
    """Return the embeddings as float32 of length 1; half precision is moved before it is widened."""
    return F.normalize(embeddings.to(device).float(), dim=1)


def _search(queries: Tensor, entries: Tensor, num: int, chunk_size: int) -> Neighbours:
    """Return the ``num`` nearest of each query, in the order of their places."""
    finite = bool((queries.sum() + entries.sum()).isfinite())  # of unit vectors no sum overflows
    large = len(queries) * entries.numel() > SMALL
    if queries.device.type == "cpu" and finite and large:  # faiss passes NaN over, and a GPU needs none of it
        return _search_by_faiss(queries, entries, num, chunk_size)
    parts = [_top(chunk @ entries.T, num) for chunk in torch.split(queries, chunk_size)]
    return Neighbours(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _search_by_faiss(queries: Tensor, entries: Tensor, num: int, chunk_size: int) -> Neighbours:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    # one more: whether the last has an equal that was left out
    asked = min(num + 1, len(entries))
    found = faiss.knn(queries.numpy(), entries.numpy(), asked, metric=faiss.METRIC_INNER_PRODUCT)
    similarities, indices = map(torch.from_numpy, found)
    tied = similarities[:, num - 1] == similarities[:, -1] if asked > num else torch.zeros(len(queries)).bool()
    indices, order = indices[:, :num].sort(dim=1)
    similarities = similarities[:, :num].gather(1, order)
    for rows in torch.split(tied.nonzero().flatten(), chunk_size):  # faiss took any of several equals
        similarities[rows], indices[rows] = _top(queries[rows] @ entries.T, num)
    return Neighbours(similarities, indices)


def _top(similarities: Tensor, num: int) -> Neighbours:
    """Return the ``num`` largest of each row, in the order of their places; the first of equals are taken."""
    if num >= similarities.shape[1]:
        places = torch.arange(similarities.shape[1], device=similarities.device)
        return Neighbours(similarities, places.expand_as(similarities))
    values, indices = similarities.topk(num + 1, dim=1)
    if num:
        tied = values[:, num] == values[:, num - 1]  # topk took any of several equals
        if tied.any():
            indices[tied, :num] = _top_first(similarities[tied], values[tied, num - 1], num)
    indices = indices[:, :num].sort(dim=1).values
    return Neighbours(similarities.gather(1, indices), indices)


def _top_first(similarities: Tensor, least: Tensor, num: int) -> Tensor:
    """Return the places of the ``num`` largest of each row, of which ``least`` is the smallest."""
    least = least[:, None]
    # not `>`: topk has NaN for the largest
    above = ~(similarities <= least)
    # the first of the equals rank highest
    ranks = torch.arange(similarities.shape[1], 0, -1, device=similarities.device) * (similarities == least)
    return ranks.masked_fill(above, similarities.shape[1] + 1).topk(num, dim=1).indices


def _merge(known: Neighbours, found: Neighbours, num: int) -> Neighbours:
    """Keep the ``num`` nearest of both, nearest first; ``known`` stand before ``found`` in the bank."""
    similarities, indices = (torch.cat(parts, dim=1) for parts in zip(known, found, strict=True))
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return Neighbours(similarities[:, :num].clone(), indices.gather(1, order[:, :num]))


def merge(parts: Sequence[Neighbours], num_neighbours: int) -> Neighbours:
    """Return the nearest of several searches, each in another part of a bank.

    Args:
        parts: what was found, their ``indices`` being places in the whole bank; of any number, also of none.
        num_neighbours: how many are kept.

    Returns:
        What one search in the whole bank finds: of entries equally near, the one that stands first comes first.

    Example:
        >>> found = [Neighbours(torch.tensor([[0.9]]), torch.tensor([[3]])), Neighbours(torch.tensor([[0.9, 0.5]]),
        ...     torch.tensor([[1, 0]]))]
        >>> merge(found, 2).indices
        tensor([[1, 3]])
    """
    similarities, indices = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    indices, order = indices.sort(dim=1)
    similarities, order = similarities.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Neighbours(similarities[:, :num_neighbours], indices.gather(1, order[:, :num_neighbours]))


def vote(found: Neighbours, labels: Tensor, *, temperature: float = 0.1, chunk_size: int = 1000) -> Predictions:
    """Classify queries by all the neighbours that were found, as :func:`knn_predict` does.

    Args:
        found: from :func:`nearest`.
        labels: class of each bank entry, shape ``(N,)``, integers from 0.
        temperature: of the weighted vote, above 0.
        chunk_size: queries counted at once.

    Raises:
        ValueError: if ``temperature`` is not above 0.
    """
    _check_temperature(temperature)
    number = found.indices.shape[1]
    return _vote(found, labels, [number], temperature, chunk_size)[number]


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    num_neighbours: int = 20,
    temperature: float = 0.1,
    chunk_size: int = 1024,
    bank_chunk_size: int = 25000,
    device: torch.device | str | None = None,
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
        chunk_size: queries compared at once.
        bank_chunk_size: bank entries compared at once; both bound memory as in :func:`nearest`.
        device: where to compute; by default where the queries lie.

    Raises:
        ValueError: if ``num_neighbours`` is not in 1..N, or ``temperature`` not above 0.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_predict(torch.tensor([[2.0, 0.1]]), bank, torch.tensor([0, 0, 1]), num_neighbours=2).majority
        tensor([0])

    References:
        Wu et al. 2018, arXiv:1805.01978, sec. 3.4 (the weighted vote).
    """
    _check_temperature(temperature)
    found = nearest(
        queries, bank, num_neighbours, chunk_size=chunk_size, bank_chunk_size=bank_chunk_size, device=device
    )
    return _vote(found, labels, [num_neighbours], temperature, chunk_size)[num_neighbours]


def knn_sweep(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    neighbours: Sequence[int] = (1, 5, 10, 20, 50, 100, 200),
    temperature: float = 0.1,
    chunk_size: int = 1024,
    bank_chunk_size: int = 25000,
    device: torch.device | str | None = None,
) -> dict[int, Predictions]:
    """Classify as :func:`knn_predict` does, for several numbers of neighbours, from one search.

    Args:
        queries: shape ``(Q, D)``.
        bank: shape ``(N, D)``.
        labels: class of each bank entry, shape ``(N,)``, integers from 0.
        neighbours: how many vote, in any order; those above ``N`` are left out.
        temperature: of the weighted vote, above 0.
        chunk_size: queries compared at once.
        bank_chunk_size: bank entries compared at once; both bound memory as in :func:`nearest`.
        device: where to compute; by default where the queries lie.

    Returns:
        The predictions by number of neighbours, the smallest first.

    Raises:
        ValueError: if a number is below 1, all are above ``N``, or ``temperature`` is not above 0.

    Example:
        >>> bank, labels = torch.tensor([[1.0, 0.0], [0.9, 0.4], [0.8, 0.5]]), torch.tensor([0, 1, 1])
        >>> swept = knn_sweep(torch.tensor([[1.0, 0.0]]), bank, labels, neighbours=(1, 3, 5))
        >>> {num: votes.majority.item() for num, votes in swept.items()}
        {1: 0, 3: 1}

    References:
        Wu et al. 2018, arXiv:1805.01978, sec. 3.4; Caron et al. 2021, arXiv:2104.14294, app. F.1 (the sweep).
    """
    _check_temperature(temperature)
    numbers = sorted({number for number in neighbours if number <= len(bank)})
    if not numbers or numbers[0] < 1:
        raise ValueError(
            f"neighbours must name a number between 1 and the bank size {len(bank)}, and none below 1, "
            f"got {tuple(neighbours)}"
        )
    found = nearest(queries, bank, numbers[-1], chunk_size=chunk_size, bank_chunk_size=bank_chunk_size, device=device)
    return _vote(found, labels, numbers, temperature, chunk_size)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


@torch.no_grad()
def _vote(
    found: Neighbours, labels: Tensor, numbers: Sequence[int], temperature: float, chunk_size: int
) -> dict[int, Predictions]:
    """Let the first of the found vote, as many as each of the ascending ``numbers`` says."""
    num_classes = int(labels.max()) + 1
    labels = labels.to(found.indices.device)
    chunks = [
        list(_count(similarities, labels[indices], num_classes, numbers, temperature))
        for similarities, indices in zip(*(torch.split(part, chunk_size) for part in found), strict=True)
    ]
    return {
        number: Predictions(*(torch.cat(votes) for votes in zip(*parts, strict=True)))
        for number, parts in zip(numbers, zip(*chunks, strict=True), strict=True)
    }


def _count(
    similarities: Tensor, classes: Tensor, num_classes: int, numbers: Sequence[int], temperature: float
) -> Iterator[Predictions]:
    """Count the votes of neighbours whose similarities and classes are ``(Q, K)``, each only once."""
    counts = torch.zeros(len(classes), num_classes, device=similarities.device)  # (Q, classes)
    weighted = torch.zeros_like(counts)
    # the largest similarity becomes exp(0): no overflow however small the temperature
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    for start, stop in zip([0, *numbers], numbers, strict=False):
        counts.scatter_add_(1, classes[:, start:stop], torch.ones_like(weights[:, start:stop]))
        weighted.scatter_add_(1, classes[:, start:stop], weights[:, start:stop])
        yield Predictions(counts.argmax(1), weighted.argmax(1))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of ``predicted`` that equals ``labels``, both of shape ``(Q,)``.

    Example:
        >>> accuracy(torch.tensor([0, 1]), torch.tensor([0, 0]))
        0.5
    """
    return (predicted == labels).double().mean().item()
