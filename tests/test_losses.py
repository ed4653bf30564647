import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_ssl.losses import balanced_weights, byol_loss, cross_entropy


def random_pair(batch=5, dim=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, dim, generator=generator, dtype=torch.float64).unbind()


def loss_by_hand(p, z):
    dot = sum(a * b for a, b in zip(p, z, strict=True))
    return 2 - 2 * dot / (math.sqrt(sum(a * a for a in p)) * math.sqrt(sum(b * b for b in z)))


def test_byol_loss_is_the_formula():
    p, z = random_pair()
    expected = [loss_by_hand(a, b) for a, b in zip(p.tolist(), z.tolist(), strict=True)]
    assert byol_loss(p, z).tolist() == pytest.approx(expected, rel=1e-12)


def test_byol_loss_is_the_squared_distance_of_unit_rows():
    p, z = (x.numpy() for x in random_pair())
    unit_p, unit_z = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (p, z))
    expected = ((unit_p - unit_z) ** 2).sum(1)
    np.testing.assert_allclose(byol_loss(torch.from_numpy(p), torch.from_numpy(z)), expected, rtol=1e-12)


@pytest.mark.parametrize(("z", "loss"), [((3.0, 0.0), 0.0), ((0.0, 3.0), 2.0), ((-3.0, 0.0), 4.0)])
def test_byol_loss_is_0_along_2_across_and_4_against(z, loss):
    assert byol_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([z])).item() == pytest.approx(loss)


def test_byol_loss_gradient_is_the_formula():
    p, z = random_pair()
    p.requires_grad_()
    byol_loss(p, z).sum().backward()
    a, b = p.detach().numpy(), z.numpy()
    norm_a, norm_b = (np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    dot = (a * b).sum(1, keepdims=True)
    expected = -2 * (b / (norm_a * norm_b) - dot * a / (norm_a**3 * norm_b))
    np.testing.assert_allclose(p.grad, expected, rtol=1e-10)


def test_byol_loss_gives_the_projection_no_gradient():
    p, z = (x.requires_grad_() for x in random_pair())
    byol_loss(p, z).sum().backward()
    assert p.grad is not None
    assert z.grad is None


@settings(deadline=None)
@given(scale_p=st.floats(1e-3, 1e3), scale_z=st.floats(1e-3, 1e3))
def test_byol_loss_ignores_lengths(scale_p, scale_z):
    p, z = random_pair()
    torch.testing.assert_close(byol_loss(scale_p * p, scale_z * z), byol_loss(p, z))


@settings(deadline=None)
@given(seed=st.integers(0, 2**16))
def test_byol_loss_ignores_rotations_and_stays_within_0_and_4(seed):
    p, z = random_pair(seed=seed)
    rotation, _ = torch.linalg.qr(random_pair(7, 7, seed=seed)[0])
    losses = byol_loss(p, z)
    torch.testing.assert_close(byol_loss(p @ rotation, z @ rotation), losses)
    assert ((losses >= 0) & (losses <= 4)).all()


def test_byol_loss_names_both_shapes():
    with pytest.raises(ValueError, match=r"prediction and projection must have one shape, got \(2, 3\) and \(3, 2\)"):
        byol_loss(torch.ones(2, 3), torch.ones(3, 2))


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_mean_over_the_images_with_a_class(weights, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2, -1, 1, -2, 2])
    known = labels >= 0
    each = torch.nn.functional.cross_entropy(
        logits[known],
        labels[known],
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        reduction="none",
        label_smoothing=smoothing,
    )
    total = 4 if weights is None else 0.5 + 1 + 2 + 1
    got = cross_entropy(logits, labels, class_weights=weights, label_smoothing=smoothing)
    torch.testing.assert_close(got, each.sum() / total)


def test_cross_entropy_of_no_classes_is_nothing_and_has_no_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([-1, -2]))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_balanced_weights_give_every_class_the_same_say():
    counts = [30, 10, 5]
    weights = balanced_weights(counts)
    assert [weight * count for weight, count in zip(weights, counts, strict=True)] == pytest.approx([15, 15, 15])
