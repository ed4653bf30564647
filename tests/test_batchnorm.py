import inspect

import pytest
import torch
from pytorch_lightning.plugins import LayerSync
from pytorch_lightning.strategies import DDPStrategy
from several_processes import layers, method
from tiny import fit, pairs, quiet_trainer, tiny_method
from torch import nn

from mlflow_ssl.batchnorm import (
    BatchNormSync,
    SharedOnCPU,
    SharedOnGPU,
    has_plain_batchnorm,
    pooled,
    separate_batchnorm,
    share_batchnorm,
    use_batchnorm_sync,
)


def test_pooled_statistics_are_those_of_all_numbers():
    numbers = torch.randn(3 + 4 + 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 100
    groups = numbers.split([3, 4, 9])
    means, variances = (
        torch.stack([of(group, 0) for group in groups])
        for of in (torch.mean, lambda group, axis: group.var(axis, correction=0))
    )
    mean, variance, count = pooled(means, variances, torch.tensor([[3.0], [4.0], [9.0]]))
    torch.testing.assert_close(mean, numbers.mean(0))
    torch.testing.assert_close(variance, numbers.var(0, correction=0))
    assert count == 16


def test_shared_and_separate_again_a_network_is_what_it_was():
    network = method()
    before = {name: (module, type(module)) for name, module in network.named_modules()}
    weights = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    assert has_plain_batchnorm(network)
    assert share_batchnorm(network) == share_batchnorm(network) == 4 + 3  # two norms and a head's, and the predictor's
    assert not has_plain_batchnorm(network)
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == weights
    separate_batchnorm(network)
    assert {name: (module, type(module)) for name, module in network.named_modules()} == before


@pytest.mark.parametrize("name", list(layers()))
@pytest.mark.parametrize("training", [True, False])
def test_alone_or_in_evaluation_a_shared_layer_is_a_plain_one(name, training):
    (plain, batches), (shared, _) = layers()[name], layers()[name]
    share_batchnorm(shared)
    for images, _ in batches:
        assert shared.train(training)(images).equal(plain.train(training)(images))
    for buffer, value in plain.named_buffers():
        assert dict(shared.named_buffers())[buffer].equal(value)


def test_a_layer_with_a_forward_pass_of_its_own_is_left_alone():
    class Halved(nn.BatchNorm1d):
        def forward(self, images):
            return super().forward(images) / 2

    network = nn.Sequential(Halved(3), nn.SyncBatchNorm(3), nn.LayerNorm(3))
    assert share_batchnorm(network) == 0
    assert [type(module) for module in network] == [Halved, nn.SyncBatchNorm, nn.LayerNorm]
    assert has_plain_batchnorm(network)
    assert not has_plain_batchnorm(network[1:])


def test_ours_takes_what_torchs_function_for_gpus_takes():
    ours, theirs = (list(inspect.signature(each.forward).parameters) for each in (SharedOnCPU, SharedOnGPU))
    assert ours[2:] == theirs[2:]  # after the context and the images


def test_a_trainer_shares_batchnorm_unless_told_otherwise():
    class Own(LayerSync):
        def apply(self, model):
            return model

        revert = apply

    found = []
    for settings in ({"sync_batchnorm": True}, {"sync_batchnorm": False}, {"plugins": [Own()]}):
        trainer = quiet_trainer(strategy=DDPStrategy(), devices=2, **settings)
        use_batchnorm_sync(trainer)
        found.append(type(trainer.strategy._layer_sync))
    assert found == [BatchNormSync, type(None), Own]


def test_one_process_trains_as_ever():
    plain, told = tiny_method(), tiny_method()
    fit(plain, pairs(3), max_epochs=1)
    fit(told, pairs(3), max_epochs=1, sync_batchnorm=True)
    for name, value in plain.state_dict().items():
        assert told.state_dict()[name].equal(value), name
