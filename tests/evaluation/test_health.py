import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_ssl.evaluation.health import (
    agreement,
    alignment,
    deviation_per_dimension,
    mean_cosine,
    rankme,
    uniformity,
)
from mlflow_ssl.losses import byol_loss


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rankme_is_the_formula_written_out():
    embeddings = normal(40, 6) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.01])
    values = np.linalg.svd(embeddings.double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert rankme(embeddings) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (300, 128)])
def test_rankme_is_that_of_the_eigenvalues_of_the_second_moments(shape):
    embeddings = normal(*shape, seed=3) + 0.5
    rows = embeddings.double().numpy()
    values = np.sqrt(np.clip(np.linalg.eigvalsh(rows.T @ rows), 0, None))[::-1][: min(shape)]
    shares = values / values.sum() + 1e-7
    assert rankme(embeddings) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_counts_equal_directions(rank):
    embeddings = torch.zeros(rank, 8)
    embeddings[torch.arange(rank), torch.arange(rank)] = 2.0
    assert rankme(embeddings) == pytest.approx(rank, rel=1e-4)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_rankme_ignores_scale_order_and_rotation(seed, scale):
    embeddings = normal(20, 5, seed=seed)
    turn, _ = torch.linalg.qr(normal(5, 5, seed=seed + 1))
    expected = pytest.approx(rankme(embeddings), rel=1e-3)
    assert rankme(scale * embeddings) == expected
    assert rankme(embeddings[torch.randperm(20, generator=torch.Generator().manual_seed(seed))]) == expected
    assert rankme(embeddings @ turn) == expected


def test_a_collapsed_network_has_rank_one_and_a_dead_one_none():
    assert rankme(torch.ones(50, 16) * 3) == pytest.approx(1.0, abs=1e-3)
    assert rankme(torch.zeros(50, 16)) == 0.0


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 2, 2)])
def test_rankme_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"^embeddings must have the shape \(N, D\), got \("):
        rankme(torch.zeros(shape))


# spread


def directions_of(embeddings):
    rows = embeddings.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pairs_of(rows):
    return [(one, other) for i, one in enumerate(rows) for j, other in enumerate(rows) if i != j]


def test_the_deviation_is_the_formula_written_out():
    embeddings = normal(40, 6) + 1
    spread = np.mean([np.std(column) for column in directions_of(embeddings).T])
    assert deviation_per_dimension(embeddings) == pytest.approx(spread * 6**0.5, rel=1e-5)


def test_the_deviation_is_1_of_uniform_directions_and_0_of_one():
    assert deviation_per_dimension(normal(4000, 64)) == pytest.approx(1.0, abs=0.01)
    assert deviation_per_dimension(torch.ones(50, 1) * normal(1, 16)) == pytest.approx(0.0, abs=1e-6)


def test_the_mean_cosine_is_that_of_all_pairs_written_out():
    embeddings = normal(20, 5) + 1
    expected = np.mean([one @ other for one, other in pairs_of(directions_of(embeddings))])
    assert mean_cosine(embeddings) == pytest.approx(expected, rel=1e-5)


def test_the_mean_cosine_of_nearly_one_direction_is_exact():
    embeddings = torch.ones(500, 8) + 1e-3 * normal(500, 8)
    rows = directions_of(embeddings)
    expected = (np.square(rows.sum(0)).sum() - 500) / (500 * 499)
    assert 1 - mean_cosine(embeddings) == pytest.approx(1 - expected, rel=0.05)


def test_an_embedding_of_zeros_has_no_cosine_with_others():
    assert mean_cosine(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])) == pytest.approx(1 / 3)


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_is_that_of_all_pairs_written_out(t):
    embeddings = normal(20, 5) + 1
    squares = [np.square(one - other).sum() for one, other in pairs_of(directions_of(embeddings))]
    assert uniformity(embeddings, t=t) == pytest.approx(np.log(np.mean(np.exp(-t * np.array(squares)))), rel=1e-5)


def test_uniformity_is_0_of_one_direction_and_minus_4_t_of_opposite_ones():
    assert uniformity(torch.ones(50, 16)) == pytest.approx(0.0, abs=1e-5)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), t=3.0) == pytest.approx(-12.0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("measure", [deviation_per_dimension, mean_cosine, uniformity])
def test_spread_ignores_length_and_order(measure, seed, scale):
    embeddings = normal(20, 5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lengths, order = scale * (0.1 + torch.rand(20, 1, generator=generator)), torch.randperm(20, generator=generator)
    assert measure((lengths * embeddings)[order]) == pytest.approx(measure(embeddings), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("measure", [deviation_per_dimension, mean_cosine, uniformity])
def test_spread_is_of_two_at_least(measure):
    with pytest.raises(ValueError, match=r"^embeddings must be of 2 images at least, got 1$"):
        measure(torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"^embeddings must have the shape \(N, D\), got \(4,\)$"):
        measure(torch.ones(4))


def test_uniformity_refuses_a_weight_that_does_not_fall():
    with pytest.raises(ValueError, match=r"^t must be greater than 0, got 0$"):
        uniformity(torch.eye(3), t=0)


# pairs


def test_alignment_is_the_formula_written_out():
    one, other = normal(12, 5, seed=1), normal(12, 5, seed=2)
    rows = zip(directions_of(one), directions_of(other), strict=True)
    assert alignment(one, other) == pytest.approx(np.mean([np.square(u - v).sum() for u, v in rows]), rel=1e-5)
    assert alignment(one, 7 * one) == pytest.approx(0.0, abs=1e-6)
    assert alignment(one, -one) == pytest.approx(4.0)


def test_agreement_is_the_formula_written_out():
    one, other = normal(12, 5, seed=1), normal(12, 5, seed=2)
    cosines = [
        sum(a * b for a, b in zip(u, v, strict=True)) / (sum(a * a for a in u) * sum(b * b for b in v)) ** 0.5
        for u, v in zip(one.tolist(), other.tolist(), strict=True)
    ]
    assert agreement(one, other) == pytest.approx(sum(cosines) / 12, rel=1e-5)


def test_agreement_is_what_byols_loss_says():
    one, other = normal(12, 5, seed=1), normal(12, 5, seed=2)
    both = (byol_loss(one, other) + byol_loss(other, one)).mean().item()
    assert both == pytest.approx(4 - 4 * agreement(one, other), rel=1e-5)


@pytest.mark.parametrize("measure", [alignment, agreement])
def test_pairs_must_have_one_shape(measure):
    with pytest.raises(ValueError, match=r" must have one shape \(B, D\), got \(2, 3\) and \(3, 3\)$"):
        measure(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match=r" must have one shape \(B, D\), got \(0, 3\) and \(0, 3\)$"):
        measure(torch.ones(0, 3), torch.ones(0, 3))
