"""A search for neighbours that the processes of a training share."""

import torch
from torch import Tensor

from mlflow_ssl.callbacks.embeddings import Gathered
from mlflow_ssl.evaluation.knn import Neighbours, merge, nearest
from mlflow_ssl.processes import joined, rank_and_world_size


def shared_nearest(
    queries: Gathered, bank: Gathered, rows: Tensor, num_neighbours: int, *, device: torch.device
) -> Neighbours:
    """Find the nearest bank images of each query, each process in its own part of the bank.

    So a bank is held once by all processes together, and only the queries and what was found for them travel.

    Args:
        queries: of all processes.
        bank: of this process.
        rows: of the bank images of all processes, ascending, shape ``(N,)``.
        num_neighbours: ``K``, at most ``N``.
        device: where to compute, and through which processes speak.

    Returns:
        What one process finds in the whole bank, ``indices`` being places in ``rows``; in other processes than the
        first there are no queries.

    Raises:
        ValueError: in all processes, if ``num_neighbours`` is not in 1..N.
    """
    if not 1 <= num_neighbours <= len(rows):
        raise ValueError(f"num_neighbours must be between 1 and the bank size {len(rows)}, got {num_neighbours}")
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return nearest(queries.embeddings, bank.embeddings, num_neighbours, device=device)
    found = _padded(queries, bank, num_neighbours, device)
    parts = Neighbours(*(joined(part, device, everywhere=False) for part in found))
    if not len(parts.indices):
        return parts
    similarities, indices = (part.chunk(world_size) for part in parts)
    best = merge([Neighbours(*part) for part in zip(similarities, indices, strict=True)], num_neighbours)
    return Neighbours(best.similarities, torch.searchsorted(rows, best.indices))


def _padded(queries: Gathered, bank: Gathered, num: int, device: torch.device) -> Neighbours:
    """Return the nearest images of this process, by their rows; where it has too few, some infinitely far."""
    similarities = torch.full((len(queries.rows), num), -torch.inf)
    rows = torch.zeros(len(queries.rows), num, dtype=torch.long)
    here = min(num, len(bank.rows))
    if here:
        found = nearest(queries.embeddings, bank.embeddings, here, device=device)
        similarities[:, :here] = found.similarities
        rows[:, :here] = bank.rows[found.indices]
    return Neighbours(similarities, rows)
