from functools import partial

import pytest
import torch
from tiny import fit, labelled, pairs, tiny_method
from torch import nn
from torch.optim import SGD

from mlflow_ssl.methods import SSLMethod


def test_an_embedding_is_the_output_of_the_online_backbone():
    method = tiny_method().eval()
    ((images, _),) = labelled(1)
    assert method.embed(images).equal(method.online.backbone(images))


def test_embeddings_are_float32_under_bf16_autocast():
    method = tiny_method().eval()
    ((images, labels),) = labelled(1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert method.online.backbone(images).dtype == torch.bfloat16
        assert method.embed(images).dtype == torch.float32
        assert method.validation_step((images, labels), 0).dtype == torch.float32
        assert method.test_step((images, labels), 0).dtype == torch.float32


def test_channels_last_lays_out_weights_and_images_and_changes_no_embedding():
    layouts = []
    plain, fast = tiny_method(), tiny_method(channels_last=True)
    fast.online.backbone.conv.register_forward_pre_hook(
        lambda module, args: layouts.extend(
            t.is_contiguous(memory_format=torch.channels_last) for t in (args[0], module.weight)
        )
    )
    for method in (plain, fast):
        fit(method, pairs(1), max_epochs=1)
    assert layouts == [True] * 4
    ((images, _),) = labelled(1)
    torch.testing.assert_close(fast.eval().embed(images), plain.eval().embed(images))


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 5), (2, 3)])
def test_the_schedule_is_told_steps_and_images_of_an_optimizer_step(accumulate, steps):
    told = {}

    def scheduler(optimizer, **kwargs):
        told.update(kwargs)
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    method = tiny_method(scheduler=scheduler, batch_size=4)
    fit(method, pairs(5), max_epochs=3, accumulate_grad_batches=accumulate)
    assert told == {"total_steps": 3 * steps, "steps_per_epoch": steps, "global_batch": 4 * accumulate}


def test_limit_train_batches_shortens_the_schedule():
    told = {}

    def scheduler(optimizer, **kwargs):
        told.update(kwargs)
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    fit(tiny_method(scheduler=scheduler), pairs(5), max_epochs=2, limit_train_batches=3)
    assert (told["total_steps"], told["steps_per_epoch"]) == (6, 3)


def test_without_scheduler_the_optimizer_keeps_its_rate():
    trainer = fit(tiny_method(optimizer=partial(SGD, lr=0.3)), pairs(2), max_epochs=2)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.3, 0.3]


def test_a_method_trains_the_online_network_unless_it_says_otherwise():
    online = nn.Linear(2, 2)
    assert SSLMethod(online, optimizer=partial(SGD, lr=0.1)).trained_modules() == [online]


@pytest.mark.parametrize(("accumulate", "held"), [(1, [False] * 4), (2, [False, True, False, True])])
def test_gradients_are_gone_before_the_next_activations_come(accumulate, held):
    method, found = tiny_method(), []
    weight = method.online.backbone.conv.weight
    method.online.backbone.conv.register_forward_pre_hook(lambda *_: found.append(weight.grad is not None))
    fit(method, pairs(4), max_epochs=1, accumulate_grad_batches=accumulate)
    assert found[::2] == held  # of the two views of each batch
