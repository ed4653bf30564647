"""Images that look like copies of each other, and labels that their neighbours contradict."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlflow_ssl.evaluation.knn import Neighbours, nearest


class Doubts(NamedTuple):
    """What an image's neighbours say of its label, each of shape ``(N,)``.

    Attributes:
        own: share of their votes for the image's own class, in [0, 1]; 1 where the image has no class.
        other: the class that has most of their votes.
        share: its share.
    """

    own: Tensor
    other: Tensor
    share: Tensor


def neighbours_within(embeddings: Tensor, num_neighbours: int) -> Neighbours:
    """Return the nearest other embeddings of each of a set, closest first, each ``(N, K)``.

    Args:
        embeddings: shape ``(N, D)``.
        num_neighbours: ``K``; fewer where there are not so many others.

    Raises:
        ValueError: if there are less than two.
    """
    if len(embeddings) < 2:
        raise ValueError(f"embeddings must be at least two, got {len(embeddings)}")
    count = min(num_neighbours, len(embeddings) - 1)
    found = nearest(embeddings, embeddings, count + 1)
    # itself comes first, unless copies of it stand before it: put it last, and cut it off
    itself = found.indices == torch.arange(len(embeddings), device=embeddings.device).unsqueeze(1)
    itself[~itself.any(1), -1] = True  # more copies than neighbours: any of them is as near
    order = itself.int().argsort(dim=1, stable=True)[:, :-1]
    return Neighbours(found.similarities.gather(1, order), found.indices.gather(1, order))


def copy_groups(neighbours: Neighbours, *, threshold: float) -> npt.NDArray[np.int64]:
    """Return the group of near-copies of each image, ``(N,)``: numbers from 0, and -1 for what has no copy.

    Images that are at least as similar as the threshold are in one group, and so are copies of a copy.

    Args:
        neighbours: of each image among the others, ``(N, K)``.
        threshold: cosine.

    Example:
        >>> found = Neighbours(torch.tensor([[0.99], [0.99], [0.2]]), torch.tensor([[1], [0], [0]]))
        >>> copy_groups(found, threshold=0.95)
        array([ 0,  0, -1])
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(neighbours.indices)
    image, place = (neighbours.similarities >= threshold).nonzero(as_tuple=True)
    ends = image.cpu().numpy(), neighbours.indices[image, place].cpu().numpy()
    graph = coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    several = np.bincount(component) > 1
    numbers = np.where(several, np.cumsum(several) - 1, -1)
    groups: npt.NDArray[np.int64] = numbers[component].astype(np.int64)
    return groups


def doubts(neighbours: Neighbours, labels: Tensor, *, temperature: float = 0.1) -> Doubts:
    r"""Ask each image's neighbours for its class.

    A neighbour of similarity :math:`s` has :math:`\exp(s / T)` votes, and none where it has no class.

    Args:
        neighbours: of each image among the others, ``(N, K)``.
        labels: class of each image, ``(N,)``, integers from 0, negative without one.
        temperature: ``T``, above 0.

    References:
        Wu et al. 2018, arXiv:1805.01978, sec. 3.4 (the vote); Northcutt et al. 2021, arXiv:1911.00068 (that labels are
        doubted where predictions out of sample contradict them).
    """
    classes = labels[neighbours.indices]  # (N, K)
    weights = ((neighbours.similarities - neighbours.similarities[:, :1]) / temperature).exp() * (classes >= 0)
    votes = torch.zeros(len(labels), max(int(labels.max()) + 1, 1), device=weights.device)
    votes.scatter_add_(1, classes.clamp(min=0), weights)
    votes /= votes.sum(1, keepdim=True).clamp(min=1e-12)
    share, other = votes.max(1)
    own = votes.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return Doubts(torch.where(labels >= 0, own, 1.0), other, share)
