from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from mlflow_ssl.heads import MLP, Encoder


def test_mlp_is_the_formula():
    head = MLP(3, hidden_features=5, out_features=2).double()
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = head(x)
    first, norm, _, last = head
    hidden = x.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + norm.eps)
    expected = np.maximum(hidden, 0) @ last.weight.detach().numpy().T
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-8, atol=1e-12)


def test_mlp_has_the_width_and_the_biases_of_the_reference_code():
    shapes = {name: tuple(p.shape) for name, p in MLP(2048).named_parameters()}
    assert shapes == {
        "0.weight": (4096, 2048),
        "0.bias": (4096,),
        "1.weight": (4096,),
        "1.bias": (4096,),
        "3.weight": (256, 4096),
    }


class Backbone(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(images).flatten(1)[:, : self.num_features]


def test_encoder_is_projector_after_backbone():
    encoder = Encoder(Backbone(), partial(MLP, hidden_features=4, out_features=2)).eval()
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert encoder(images).equal(encoder.projector(encoder.backbone(images)))
    assert encoder(images).shape == (2, 2)


def test_encoder_asks_for_a_projector_as_wide_as_the_embedding():
    asked = []
    Encoder(Backbone(), lambda **kwargs: asked.append(kwargs) or nn.Identity())
    assert asked == [{"in_features": 6}]


@pytest.mark.parametrize("make", [lambda: MLP(3, hidden_features=4), lambda: Encoder(Backbone(), partial(MLP))])
def test_making_a_network_shifts_no_batchnorm_statistics(make):
    norms = [m for m in make().modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert norms
    assert all(norm.num_batches_tracked == 0 for norm in norms)
