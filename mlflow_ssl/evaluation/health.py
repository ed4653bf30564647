"""What embeddings say of themselves, without labels."""

import torch
import torch.nn.functional as F
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
    _check_embeddings(embeddings, at_least=1)
    values = torch.linalg.svdvals(embeddings.float())
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total + epsilon
    return float(torch.exp(-(shares * shares.log()).sum()))


def deviation_per_dimension(embeddings: Tensor) -> float:
    r"""Return how far the directions of embeddings spread: about 1 where they are uniform, 0 where all are one.

    .. math:: \frac{\sqrt D}{D} \sum_{d=1}^{D} \operatorname{std}_i \frac{x_{id}}{\lVert x_i \rVert}

    Args:
        embeddings: shape ``(N, D)``, two or more.

    Returns:
        The mean standard deviation (of the population, with the factor ``1 / N``) by that of a uniform direction, in
        [0, 1].

    Raises:
        ValueError: if there are fewer than two embeddings.

    Example:
        >>> round(deviation_per_dimension(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -3.0]])), 3)
        1.0
        >>> deviation_per_dimension(torch.ones(8, 4))
        0.0

    References:
        Chen and He 2021, arXiv:2011.10566, sec. 4.1 and fig. 2, who do not multiply by the root.
    """
    directions = _directions(embeddings)
    return float(directions.std(dim=0, correction=0).mean() * directions.shape[1] ** 0.5)


def mean_cosine(embeddings: Tensor) -> float:
    r"""Return the mean cosine of all pairs of two different embeddings: 1 where all point one way.

    .. math:: \frac{1}{N (N - 1)} \sum_{i \ne j} u_i \cdot u_j = \frac{N \lVert \bar u \rVert^2 - 1}{N - 1},
        \quad u_i = \frac{x_i}{\lVert x_i \rVert}

    The right side takes ``O(N D)``, as no pair is looked at. It holds where no embedding is 0.

    Args:
        embeddings: shape ``(N, D)``, two or more.

    Returns:
        The mean, in [-1 / (N - 1), 1].

    Raises:
        ValueError: if there are fewer than two embeddings.

    Example:
        >>> mean_cosine(torch.ones(8, 4)), mean_cosine(torch.eye(4))
        (1.0, 0.0)
    """
    directions = _directions(embeddings).double()  # N |mean|^2 - 1 cancels
    total = directions.sum(dim=0).square().sum()
    itself = directions.square().sum()  # N, but for embeddings that are 0
    count = len(directions)
    return float((total - itself) / (count * (count - 1)))


def alignment(view_1: Tensor, view_2: Tensor) -> float:
    r"""Return how far apart the embeddings of two views of an image are: 0 where the network ignores the view.

    .. math:: \frac1B \sum_i \lVert u_i - v_i \rVert^2, \quad u_i = \frac{x_i}{\lVert x_i \rVert},
        v_i = \frac{y_i}{\lVert y_i \rVert}

    Args:
        view_1: embeddings :math:`x` of the first views, shape ``(B, D)``.
        view_2: embeddings :math:`y` of the second views of the same images, shape ``(B, D)``.

    Returns:
        The mean squared distance on the unit sphere, in [0, 4].

    Raises:
        ValueError: if the shapes differ, or there is no embedding.

    Example:
        >>> alignment(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
        2.0

    References:
        Wang and Isola 2020, arXiv:2005.10242, eq. 6 with alpha = 2.
    """
    _check_pairs("view_1", view_1, "view_2", view_2)
    difference = F.normalize(view_1.float(), dim=1) - F.normalize(view_2.float(), dim=1)
    return float(difference.square().sum(dim=1).mean())


def uniformity(embeddings: Tensor, *, t: float = 2.0) -> float:
    r"""Return how unevenly the directions of embeddings lie on the sphere: 0 where all are one, else below.

    .. math:: \log \frac{1}{N (N - 1)} \sum_{i \ne j} e^{-t \lVert u_i - u_j \rVert^2}
        = \log \frac{1}{N (N - 1)} \sum_{i \ne j} e^{-2 t (1 - u_i \cdot u_j)},
        \quad u_i = \frac{x_i}{\lVert x_i \rVert}

    Args:
        embeddings: shape ``(N, D)``, two or more; takes memory for ``N * N`` numbers.
        t: how fast a pair's weight falls with its distance; greater than 0.

    Returns:
        The logarithm, in [-4 t, 0]; about -2 t where directions are uniform in many dimensions.

    Raises:
        ValueError: if there are fewer than two embeddings, or ``t`` is not greater than 0.

    Example:
        >>> uniformity(torch.eye(4))
        -4.0

    References:
        Wang and Isola 2020, arXiv:2005.10242, eq. 7.
    """
    if not t > 0:
        raise ValueError(f"t must be greater than 0, got {t}")
    directions = _directions(embeddings)
    exponents = 2 * t * (directions @ directions.T - 1)  # (N, N)
    exponents.fill_diagonal_(-torch.inf)  # a pair is of two
    count = len(directions)
    return float(exponents.flatten().logsumexp(dim=0) - torch.tensor(count * (count - 1)).log())


def agreement(prediction: Tensor, projection: Tensor) -> float:
    r"""Return the mean cosine of what the online network predicts and what the target network projects.

    .. math:: \frac1B \sum_i \cos(p_i, z_i)

    BYOL's loss, which is the sum of both directions, says the same: it is :math:`4 - 4 a` for the mean :math:`a` of
    both.

    Args:
        prediction: online predictor output, shape ``(B, D)``.
        projection: target projector output of the other views, shape ``(B, D)``.

    Returns:
        The mean, in [-1, 1].

    Raises:
        ValueError: if the shapes differ, or there is no embedding.

    Example:
        >>> agreement(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        0.5
    """
    _check_pairs("prediction", prediction, "projection", projection)
    return float(F.cosine_similarity(prediction.float(), projection.float(), dim=1).mean())


def _directions(embeddings: Tensor) -> Tensor:
    """Return rows of length 1 in float32, but for rows that are 0."""
    _check_embeddings(embeddings, at_least=2)
    return F.normalize(embeddings.float(), dim=1)


def _check_embeddings(embeddings: Tensor, *, at_least: int) -> None:
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(f"embeddings must have the shape (N, D), got {tuple(embeddings.shape)}")
    if len(embeddings) < at_least:
        raise ValueError(f"embeddings must be of {at_least} images at least, got {len(embeddings)}")


def _check_pairs(name_1: str, first: Tensor, name_2: str, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise ValueError(
            f"{name_1} and {name_2} must have one shape (B, D), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
