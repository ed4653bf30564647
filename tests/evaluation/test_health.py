import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_ssl.evaluation.health import rankme


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rankme_is_the_formula_written_out():
    embeddings = normal(40, 6) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.01])
    values = np.linalg.svd(embeddings.double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert rankme(embeddings) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


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
