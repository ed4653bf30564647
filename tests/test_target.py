import pytest
import torch
from launches import Launches
from torch import nn

from mlflow_ssl.target import copy_as_target, update_target


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
        for p in made.parameters():
            nn.init.normal_(p)
        made(torch.randn(8, 3, dtype=torch.float64))  # moves the BatchNorm statistics
    return made


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.996, 1.0])
def test_update_target_moves_every_parameter_by_the_formula(tau):
    online, target = network(0), network(1)
    expected = [
        [tau * old + (1 - tau) * new for old, new in zip(xi.flatten().tolist(), theta.flatten().tolist(), strict=True)]
        for xi, theta in zip(target.parameters(), online.parameters(), strict=True)
    ]
    update_target(target, online, tau=tau)
    for p, values in zip(target.parameters(), expected, strict=True):
        assert p.flatten().tolist() == pytest.approx(values, rel=1e-12, abs=1e-15)


def test_update_target_is_one_kernel_however_many_tensors_there_are():
    online = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50)))
    target = copy_as_target(online)
    with Launches() as launches:
        update_target(target, online, tau=0.5)
    assert launches.names == ["_foreach_lerp_"]


def test_update_target_leaves_buffers_alone():
    online, target = network(0), network(1)
    before = {name: buffer.clone() for name, buffer in target.named_buffers()}
    assert not before["1.running_mean"].equal(online[1].running_mean)
    update_target(target, online, tau=0.5)
    assert all(buffer.equal(before[name]) for name, buffer in target.named_buffers())


def test_update_target_leaves_the_online_network_alone():
    online, target = network(0), network(1)
    before = {name: value.clone() for name, value in online.state_dict().items()}
    update_target(target, online, tau=0.5)
    assert all(value.equal(before[name]) for name, value in online.state_dict().items())


def test_update_target_leaves_no_trace_in_the_graph():
    online = network(0)
    target = network(1)  # its parameters require gradients, the strictest case
    update_target(target, online, tau=0.5)
    assert all(p.is_leaf and p.grad_fn is None for p in target.parameters())


def test_copy_as_target_is_equal_apart_and_without_gradient():
    online = network(0)
    target = copy_as_target(online)
    assert all(value.equal(online.state_dict()[name]) for name, value in target.state_dict().items())
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in online.parameters())
    with torch.no_grad():
        online[0].weight.add_(1)
        online[1].running_mean.add_(1)
    assert not target[0].weight.equal(online[0].weight)
    assert not target[1].running_mean.equal(online[1].running_mean)
