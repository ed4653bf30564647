import pytest
import torch
from torch import nn

from mlflow_ssl.evaluation.untrained import untrained_copy


class Network(nn.Module):
    """A convolution, a BatchNorm that has seen images, a scale and a buffer that is no weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4000, 3)
        self.norm = nn.BatchNorm2d(4000)
        self.gamma = nn.Parameter(torch.full((4000,), 0.1))
        self.token = nn.Parameter(torch.full((1, 1, 4000), 0.1))
        self.register_buffer("mean", torch.tensor([0.5]))
        self.norm(torch.randn(2, 4000, 2, 2) + 3)

    def forward(self, images):
        return self.norm(self.conv(images - self.mean)).mean((2, 3)) * self.gamma + self.token[0]


@pytest.fixture(params=["module", "script"])
def network(request):
    module = Network().eval()
    return torch.jit.trace(module, torch.rand(2, 3, 8, 8)) if request.param == "script" else module


def test_weights_are_he_et_als_and_nothing_was_seen(network):
    drawn = dict(untrained_copy(network).state_dict())
    assert drawn["conv.weight"].std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.02)
    assert drawn["token"].std().item() == pytest.approx((2 / 4000) ** 0.5, rel=0.05)
    for name in ("conv.bias", "norm.bias", "norm.running_mean"):
        assert not drawn[name].any()
    for name in ("norm.weight", "norm.running_var", "gamma"):
        assert drawn[name].eq(1).all()
    assert drawn["norm.num_batches_tracked"] == 0
    assert drawn["mean"] == 0.5  # what images are normalized by is no weight


def test_the_draw_is_the_seeds_and_the_network_stays(network):
    before = {name: values.clone() for name, values in network.state_dict().items()}
    images = torch.rand(2, 3, 8, 8)
    first, again, other = (untrained_copy(network, seed=seed)(images) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.allclose(other)
    assert all(values.equal(before[name]) for name, values in network.state_dict().items())
