import math

import pytest
import torch
from launches import Launches
from torch import nn

from mlflow_ssl import optimizers
from mlflow_ssl.optimizers import LARS, parameter_groups

SHAPES = [(4, 3), (2, 3, 3, 3), (5, 1)]


def random_tensors(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def lars_by_hand(weights, velocity, grads, *, lr, momentum, weight_decay, eta, nesterov, adapt=True):
    """Return weights and velocity of one tensor, as flat lists, after one step."""
    d = [g + weight_decay * w for g, w in zip(grads, weights, strict=True)]
    if adapt and norm(weights) > 0 and norm(d) > 0:
        d = [eta * norm(weights) / norm(d) * x for x in d]
    velocity = [momentum * v + x for v, x in zip(velocity, d, strict=True)]
    move = [x + momentum * v for x, v in zip(d, velocity, strict=True)] if nesterov else velocity
    return [w - lr * m for w, m in zip(weights, move, strict=True)], velocity


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_lars_is_a_plain_loop_over_tensors(nesterov, weight_decay):
    params = [nn.Parameter(p) for p in [*random_tensors(SHAPES, seed=0), torch.zeros(3, 2, dtype=torch.float64)]]
    optimizer = LARS(params, lr=0.5, momentum=0.9, weight_decay=weight_decay, trust_coefficient=0.01, nesterov=nesterov)
    by_hand = [(p.flatten().tolist(), [0.0] * p.numel()) for p in params]
    for step in range(5):
        for p, grad in zip(params, random_tensors([p.shape for p in params], seed=step + 1), strict=True):
            p.grad = grad
        optimizer.step()
        by_hand = [
            lars_by_hand(
                *pair,
                p.grad.flatten().tolist(),
                lr=0.5,
                momentum=0.9,
                weight_decay=weight_decay,
                eta=0.01,
                nesterov=nesterov,
            )
            for pair, p in zip(by_hand, params, strict=True)
        ]
    for p, (weights, _) in zip(params, by_hand, strict=True):
        assert p.flatten().tolist() == pytest.approx(weights, rel=1e-10)


def stepped(params, grads, **kwargs):
    params = [nn.Parameter(p.clone()) for p in params]
    optimizer = LARS(params, lr=0.5, weight_decay=0.05, trust_coefficient=0.01, **kwargs)
    for grad_of in grads:
        for p, grad in zip(params, grad_of, strict=True):
            p.grad = grad
        optimizer.step()
    return params


def channels_last(tensors):
    return [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]


@pytest.mark.parametrize("lay_out", [lambda tensors: tensors, channels_last])
def test_the_layout_of_weights_and_gradients_changes_no_step(lay_out):
    weights = random_tensors(SHAPES, seed=0)
    grads = [random_tensors(SHAPES, seed) for seed in (1, 2)]
    expected = stepped(weights, grads)
    for got, want in zip(stepped(channels_last(weights), map(lay_out, grads)), expected, strict=True):
        assert got.stride() == channels_last([want])[0].stride()
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("most", [1, 12, 60])
def test_moving_tensors_in_parcels_changes_no_step(most, monkeypatch):
    shapes = [*SHAPES, (300, 7)]  # the last takes several rows of the buffer
    weights, grads = random_tensors(shapes, seed=0), [random_tensors(shapes, seed) for seed in (1, 2)]
    expected = stepped(weights, grads)
    monkeypatch.setattr(optimizers, "IN_CACHE", most)
    for got, want in zip(stepped(weights, grads), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_tensors_of_several_types_move_each_in_its_own():
    weights, grads = random_tensors(SHAPES, seed=0), [random_tensors(SHAPES, seed=1)]
    expected = stepped(weights, grads)
    mixed, mixed_grads = ([t.float() if i else t for i, t in enumerate(tensors)] for tensors in (weights, grads[0]))
    for got, want in zip(stepped(mixed, [mixed_grads]), expected, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype))


def test_a_step_leaves_the_gradients_alone():
    grads = random_tensors(SHAPES, seed=1)
    before = [grad.clone() for grad in grads]
    stepped(random_tensors(SHAPES, seed=0), [grads])
    assert all(grad.equal(old) for grad, old in zip(grads, before, strict=True))


def launches_of_a_step(num_layers):
    network = nn.Sequential(*(part for _ in range(num_layers) for part in (nn.Linear(4, 4), nn.BatchNorm1d(4))))
    optimizer = LARS(parameter_groups(network), lr=0.1, weight_decay=1e-6)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # makes the velocities
    with Launches() as launches:
        optimizer.step()
    return launches


def test_a_step_is_less_than_20_kernels_however_many_tensors_there_are():
    few, many = launches_of_a_step(2), launches_of_a_step(50)
    assert 0 < few.count < 20
    assert many.names == few.names


def one_step(weight, grad, **kwargs):
    p = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    p.grad = torch.tensor(grad, dtype=torch.float64)
    LARS([p], **kwargs).step()
    return p.tolist()


def test_lars_by_hand():
    # |w| = 5, |g| = 10, ratio 0.1 * 5 / 10 = 0.05
    assert one_step([[3.0, 4.0]], [[6.0, 8.0]], lr=1.0, trust_coefficient=0.1) == [pytest.approx([2.7, 3.6])]


def test_lars_adapts_without_weight_decay():
    moved = one_step([[3.0, 4.0]], [[6.0, 8.0]], lr=1.0, weight_decay=0.0)
    assert moved == [pytest.approx([3 - 0.003, 4 - 0.004])]


def test_lars_takes_the_decay_into_the_trust_ratio():
    # d = g + w = (9, 12), |d| = 15, ratio 0.1 * 5 / 15
    moved = one_step([[3.0, 4.0]], [[6.0, 8.0]], lr=1.0, weight_decay=1.0, trust_coefficient=0.1)
    assert moved == [pytest.approx([3 - 9 / 30, 4 - 12 / 30])]


@pytest.mark.parametrize(("lr", "step"), [(0.01, 0.01), (0.2, 0.05), (0.0, 0.0)])
def test_clipped_lars_steps_by_the_learning_rate_or_less(lr, step):
    # ratio 0.1 * 5 / 10 = 0.05: shortens the step of 0.2, and leaves that of 0.01
    moved = one_step([[3.0, 4.0]], [[6.0, 8.0]], lr=lr, trust_coefficient=0.1, clip=True)
    assert moved == [pytest.approx([3 - 6 * step, 4 - 8 * step])]


def test_lars_has_ratio_1_for_a_tensor_of_zeros():
    assert one_step([[0.0, 0.0]], [[6.0, 8.0]], lr=0.5) == [pytest.approx([-3.0, -4.0])]


def test_lars_leaves_a_tensor_without_update_where_it_is():
    assert one_step([[3.0, 4.0]], [[0.0, 0.0]], lr=0.5) == [[3.0, 4.0]]


def test_lars_skips_parameters_without_gradient():
    moving, resting = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = LARS([moving, resting], lr=1.0, weight_decay=0.1)
    moving.grad = torch.ones(2, 2)
    optimizer.step()
    assert not moving.equal(torch.ones(2, 2))
    assert resting.equal(torch.ones(2, 2))
    assert list(optimizer.state) == [moving]


def test_lars_returns_the_loss_of_its_closure_and_uses_its_gradient():
    p = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = LARS([p], lr=1.0, trust_coefficient=0.5)

    def closure():
        loss = (3 * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert p.item() == pytest.approx(1.0)  # ratio 0.5 * 2 / 3, times gradient 3


def test_lars_continues_from_its_state_as_if_not_stopped():
    straight, stopped = (nn.Parameter(random_tensors([(3, 3)], seed=0)[0]) for _ in range(2))
    optimizers = [LARS([p], lr=0.1, trust_coefficient=0.1) for p in (straight, stopped)]
    for step in range(4):
        if step == 2:
            state = optimizers[1].state_dict()
            optimizers[1] = LARS([stopped], lr=9.0)
            optimizers[1].load_state_dict(state)
        for p, optimizer in zip((straight, stopped), optimizers, strict=True):
            p.grad = random_tensors([(3, 3)], seed=step)[0]
            optimizer.step()
    assert straight.equal(stopped)


def normed_network():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3), nn.LayerNorm(3))
    return network.double()


def test_parameter_groups_split_weights_from_biases_and_norms():
    network = normed_network()
    decayed, kept = parameter_groups(network[:2], network[2:])
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 1, 3, 3), (3, 2)]
    assert len(kept["params"]) == len(list(network.parameters())) - 2
    assert all(p.ndim == 1 for p in kept["params"])


def test_parameter_groups_leave_frozen_parameters_out():
    network = normed_network()
    network[0].requires_grad_(requires_grad=False)
    assert sum(len(group["params"]) for group in parameter_groups(network)) == len(list(network.parameters())) - 2


def test_lars_neither_decays_nor_adapts_biases_and_norms():
    network = normed_network()
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    LARS(parameter_groups(network), lr=0.5, weight_decay=0.1, trust_coefficient=0.01).step()
    for p, old in zip(network.parameters(), before, strict=True):
        if p.ndim == 1:
            torch.testing.assert_close(p, old - 0.5)
        else:
            decayed = 1 + 0.1 * old
            torch.testing.assert_close(p, old - 0.5 * 0.01 * old.norm() / decayed.norm() * decayed)


def test_an_optimizer_of_torch_takes_the_groups_and_spares_biases_and_norms_the_decay():
    network = normed_network()
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(parameter_groups(network), lr=0.1, weight_decay=0.5).step()
    for p, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(p, old if p.ndim == 1 else 0.95 * old)


def test_a_velocity_from_weights_that_lay_otherwise_goes_on():
    weights, grads = random_tensors(SHAPES, seed=0), [random_tensors(SHAPES, seed) for seed in (1, 2)]
    expected = stepped(weights, grads)
    begun = [nn.Parameter(p.clone()) for p in weights]
    former = LARS(begun, lr=0.5, weight_decay=0.05, trust_coefficient=0.01)
    params = [nn.Parameter(p) for p in channels_last(begun)]
    for p, grad in zip(begun, grads[0], strict=True):
        p.grad = grad
    former.step()
    with torch.no_grad():
        for p, q in zip(params, begun, strict=True):
            p.copy_(q)
    optimizer = LARS(params, lr=0.5, weight_decay=0.05, trust_coefficient=0.01)
    optimizer.load_state_dict(former.state_dict())
    for p, grad in zip(params, grads[1], strict=True):
        p.grad = grad
    optimizer.step()
    for got, want in zip(params, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
