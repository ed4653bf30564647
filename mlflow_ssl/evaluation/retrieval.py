"""How well an embedding finds images of its own class among others."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Retrieval(NamedTuple):
    """What queries find, ``(Q,)`` each.

    Attributes:
        average_precision: of each query, in [0, 1]; not a number where the gallery has nothing of its class.
        recall: by ``k``: 1 where one of the ``k`` nearest is of the query's class.
    """

    average_precision: Tensor
    recall: dict[int, Tensor]


@torch.no_grad()
def retrieve(
    queries: Tensor,
    labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 64,
) -> Retrieval:
    r"""Rank the gallery by cosine for each query, and judge the ranking by the classes.

    .. math:: \mathrm{AP} = \frac{1}{R} \sum_{r : \text{relevant}} \frac{|\{\text{relevant up to rank } r\}|}{r}

    Args:
        queries: shape ``(Q, D)``.
        labels: their classes, ``(Q,)``.
        gallery: shape ``(N, D)``.
        gallery_labels: their classes, ``(N,)``.
        ks: how many of the nearest are looked at for the recall; those above ``N`` are left out.
        chunk_size: queries ranked at once; bounds memory at ``chunk_size * N`` similarities.

    Raises:
        ValueError: if there is no query, or no gallery.

    Example:
        >>> points, labels = torch.eye(3), torch.tensor([0, 1, 1])
        >>> retrieve(points[:1], labels[:1], points, labels, ks=(1,)).average_precision
        tensor([1.])

    References:
        Manning, Raghavan and Schütze 2008, "Introduction to information retrieval", sec. 8.4; Musgrave et al. 2020,
        arXiv:2003.08505, sec. 2.2 (recall at k).
    """
    if not len(queries) or not len(gallery):
        raise ValueError(f"there must be queries and a gallery, got {len(queries)} and {len(gallery)}")
    entries = F.normalize(gallery.float(), dim=1)
    ks = [k for k in ks if k <= len(gallery)]
    ranks = torch.arange(1, len(gallery) + 1, device=gallery.device)
    precisions, recalls = [], []
    for chunk, classes in zip(torch.split(queries, chunk_size), torch.split(labels, chunk_size), strict=True):
        order = (F.normalize(chunk.float(), dim=1) @ entries.T).argsort(dim=1, descending=True, stable=True)
        relevant = gallery_labels[order] == classes[:, None]  # (B, N)
        precision = relevant.cumsum(1) / ranks
        precisions.append((precision * relevant).sum(1) / relevant.sum(1))
        recalls.append(torch.stack([relevant[:, :k].any(1).float() for k in ks], dim=1))
    recall = torch.cat(recalls)
    return Retrieval(torch.cat(precisions), {k: recall[:, place] for place, k in enumerate(ks)})
