import copy
import warnings
from functools import partial

import pytest
import torch
from tiny import Backbone, fit, labelled, quiet_trainer
from torch import nn

from mlflow_ssl.export import DeploymentNetwork, traced
from mlflow_ssl.heads import LinearClassifier
from mlflow_ssl.methods import Classifier
from mlflow_ssl.schedules import warmup_cosine_scheduler


def classifier(**kwargs):
    """Return a classifier whose weights follow from a seed."""
    kwargs.setdefault("optimizer", partial(torch.optim.AdamW, lr=0.05))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(Backbone(), num_classes=3, **kwargs)


def state(module):
    return copy.deepcopy(module.state_dict())


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("freeze_epochs", [2, None])
def test_a_frozen_backbone_keeps_weights_and_batchnorm_statistics_bit_for_bit(freeze_epochs):
    method = classifier(freeze_epochs=freeze_epochs)
    backbone, head = state(method.backbone), state(method.head)
    fit(method, labelled(3), labelled(1), max_epochs=2)
    assert equal(backbone, state(method.backbone))
    assert not torch.equal(head["linear.weight"], method.head.linear.weight)
    assert not torch.equal(head["norm.running_mean"], method.head.norm.running_mean)


def test_the_backbone_learns_from_the_epoch_on_that_ends_the_freeze():
    method = classifier(freeze_epochs=2)
    backbone = state(method.backbone)
    fit(method, labelled(3), labelled(1), max_epochs=3)
    assert not torch.equal(backbone["conv.weight"], method.backbone.conv.weight)
    assert not torch.equal(backbone["norm.running_mean"], method.backbone.norm.running_mean)
    assert method.backbone.norm.num_batches_tracked == 3


def test_weight_decay_leaves_a_frozen_backbone_alone():
    method = classifier(freeze_epochs=None, optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.5))
    backbone = state(method.backbone)
    fit(method, labelled(3), max_epochs=1)
    assert equal(backbone, state(method.backbone))


def test_the_backbones_rate_is_a_share_of_the_heads_with_and_without_a_schedule():
    scheduler = partial(warmup_cosine_scheduler, init_lr=0.2, warmup_epochs=0, reference_batch=None)
    for schedule, rate in ((None, 0.05), (scheduler, 0.2)):
        rates = []
        method = classifier(freeze_epochs=0, backbone_lr_scale=0.25, scheduler=schedule)
        method.on_train_batch_start = lambda *_, method=method, rates=rates: rates.append(
            [group["lr"] for group in method.trainer.optimizers[0].param_groups]
        )
        fit(method, labelled(2), max_epochs=1)
        assert rates[0] == pytest.approx([rate, rate, rate / 4, rate / 4])
        assert rates[1][2] == pytest.approx(rates[1][0] / 4)


@pytest.mark.parametrize("freeze_epochs", [1, 2, 3])
def test_a_training_resumed_before_at_and_after_the_unfreezing_ends_as_if_never_stopped(tmp_path, freeze_epochs):
    scheduler = partial(warmup_cosine_scheduler, init_lr=0.05, warmup_epochs=1)
    method = classifier(freeze_epochs=freeze_epochs, scheduler=scheduler)
    whole = fit(method, labelled(3), max_epochs=4)
    stopped = classifier(freeze_epochs=freeze_epochs, scheduler=scheduler)
    stopped.on_train_epoch_end = lambda: setattr(stopped.trainer, "should_stop", stopped.current_epoch == 1)
    trainer = quiet_trainer(max_epochs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is nothing to validate
        trainer.fit(stopped, labelled(3))
    assert trainer.global_step == 6
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = classifier(freeze_epochs=freeze_epochs, scheduler=scheduler)
    again = fit(resumed, labelled(3), max_epochs=4, ckpt_path=tmp_path / "stopped.ckpt")
    assert again.global_step == whole.global_step == 12
    assert equal(state(method), state(resumed))
    torch.testing.assert_close(again.optimizers[0].state_dict(), whole.optimizers[0].state_dict(), rtol=0, atol=0)


def test_the_exported_network_gives_the_logits_of_clean_embeddings_for_any_batch():
    method = classifier(freeze_epochs=0)
    fit(method, labelled(4), max_epochs=2)
    method.eval()
    network = DeploymentNetwork(method.backbone, (0.0,) * 3, (1.0,) * 3, head=method.head.folded())
    scripted = traced(network, torch.rand(2, 3, 6, 6))
    with torch.no_grad():
        for count in (1, 5):
            images = torch.rand(count, 3, 6, 6)
            expected = method.classify(method.embed(images))
            assert expected.shape == (count, 3)
            torch.testing.assert_close(scripted(images), expected, rtol=1e-5, atol=1e-6)


def test_a_head_begins_without_a_preference():
    assert LinearClassifier(6, 3).eval()(torch.randn(4, 6)).equal(torch.zeros(4, 3))


def test_dropout_is_of_the_training_alone():
    head = LinearClassifier(6, 3, dropout=0.5)
    nn.init.ones_(head.linear.weight)
    embeddings = torch.randn(8, 6)
    assert not head.train()(embeddings).equal(head(embeddings))
    assert head.eval()(embeddings).equal(head(embeddings))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"freeze_epochs": -1}, "freeze_epochs must be 0 or more, or null for all, got -1"),
        ({"backbone_lr_scale": 0}, "backbone_lr_scale must be above 0, got 0; freeze_epochs=null keeps the backbone"),
    ],
)
def test_numbers_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        classifier(**kwargs)
