import copy
import weakref
from functools import partial

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.plugins.precision import MixedPrecision
from tiny import Batches, fit, labelled, pairs, tiny_method
from torch import nn
from torch.optim import SGD

from mlflow_ssl.methods import BYOL, byol
from mlflow_ssl.optimizers import LARS
from mlflow_ssl.schedules import cosine_tau, warmup_cosine, warmup_cosine_scheduler


@pytest.fixture
def taus(monkeypatch):
    """Return the tau of every target update, as they happen."""
    seen = []
    update = byol.update_target

    def spy(target, online, *, tau):
        seen.append(tau)
        update(target, online, tau=tau)

    monkeypatch.setattr(byol, "update_target", spy)
    return seen


class Watch(Callback):
    """Remember the learning rate of every optimizer step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def step_by_hand(method, views, *, lr, tau):
    """Return ``method`` after one step of gradient descent and one target update, written out."""
    method = copy.deepcopy(method).train()
    loss = 0
    for view, other in (views, views[::-1]):
        p = method.predictor(method.online.projector(method.online.backbone(view)))
        z = method.target.projector(method.target.backbone(other)).detach()
        loss = loss + 2 - 2 * (p * z).sum(1) / (p.norm(dim=1) * z.norm(dim=1))
    trained = [*method.online.parameters(), *method.predictor.parameters()]
    grads = torch.autograd.grad(loss.mean(), trained)
    with torch.no_grad():
        for w, g in zip(trained, grads, strict=True):
            w.copy_(w - lr * g)
        for xi, theta in zip(method.target.parameters(), method.online.parameters(), strict=True):
            xi.copy_(tau * xi + (1 - tau) * theta)
    return method


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=lambda text, name=name: f"{name}: {text}")


def test_one_step_moves_online_and_target_by_the_written_formula():
    method = tiny_method(base_tau=0.7)
    ((views, _),) = batches = pairs(1)
    expected = step_by_hand(method, views, lr=0.1, tau=0.7)
    fit(method, batches, max_epochs=1)
    assert_same_state(method, expected)


def test_two_accumulated_batches_make_one_target_update_and_one_schedule_step(taus):
    scheduler = partial(warmup_cosine_scheduler, init_lr=0.4, warmup_epochs=1, reference_batch=None)
    watch = Watch()
    method = tiny_method(base_tau=0.9, scheduler=scheduler)
    fit(method, pairs(4), max_epochs=3, accumulate_grad_batches=2, callbacks=[watch])
    assert taus == [cosine_tau(k, total_steps=6, base=0.9) for k in range(6)]
    assert watch.rates == pytest.approx([0.4 * warmup_cosine(k, total_steps=6, warmup_steps=2) for k in range(6)])


def test_accumulation_gives_the_gradient_of_the_mean_over_its_batches():
    method = tiny_method(base_tau=0.7)
    batches = pairs(2)
    before = [p.detach().clone() for p in method.online.parameters()]
    halves = [step_by_hand(method, views, lr=0.05, tau=0.7) for views, _ in batches]
    moves = [[p - w for p, w in zip(h.online.parameters(), before, strict=True)] for h in halves]
    fit(method, batches, max_epochs=1, accumulate_grad_batches=2)
    # the target's BatchNorm normalizes by the batch, so its first batch changes nothing for the second
    for p, w, first, second in zip(method.online.parameters(), before, *moves, strict=True):
        torch.testing.assert_close(p, w + first + second)


def test_accumulated_batches_do_what_one_batch_of_all_their_images_does(taus):
    """Without BatchNorm, which normalizes each batch by itself."""

    def without_batchnorm():
        method = tiny_method(base_tau=0.7, optimizer=partial(LARS, lr=0.5, weight_decay=1e-3))
        for network in (method.online, method.target):
            network.backbone.norm = network.projector[1] = nn.Identity()
        method.predictor[1] = nn.Identity()
        return method

    whole, accumulated, start = without_batchnorm(), without_batchnorm(), without_batchnorm()
    large = pairs(3, batch_size=8)
    halves = [
        (tuple(view[part] for view in views), labels[part])
        for views, labels in large
        for part in (slice(0, 4), slice(4, 8))
    ]
    fit(whole, large, max_epochs=2)
    fit(accumulated, Batches(halves), max_epochs=2, accumulate_grad_batches=2)
    assert_same_state(accumulated, whole)
    assert taus[:6] == taus[6:] == [cosine_tau(k, total_steps=6, base=0.7) for k in range(6)]
    for name in ("online", "target"):
        moved = getattr(whole, name).backbone.conv.weight - getattr(start, name).backbone.conv.weight
        assert moved.abs().max() > 1e-4


def test_the_first_update_uses_base_tau_and_the_last_comes_close_to_1(taus):
    fit(tiny_method(base_tau=0.5), pairs(4), max_epochs=2)
    assert taus[0] == 0.5
    assert taus == [cosine_tau(k, total_steps=8, base=0.5) for k in range(8)]


def silent(method):
    method.log = lambda *args, **kwargs: None
    return method


def test_both_directions_are_summed():
    method = silent(BYOL(nn.Identity(), nn.Identity(), optimizer=partial(SGD, lr=0.1)))
    right, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert method.training_step(((right, up), None), 0).item() == pytest.approx(4.0)
    assert method.training_step(((right, -right), None), 0).item() == pytest.approx(8.0)
    assert method.training_step(((right, right), None), 0).item() == pytest.approx(0.0)


def test_the_loss_is_the_mean_over_images():
    method = silent(BYOL(nn.Identity(), nn.Identity(), optimizer=partial(SGD, lr=0.1)))
    right, mixed = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert method.training_step(((right, mixed), None), 0).item() == pytest.approx((0 + 4) / 2)


def test_each_view_predicts_the_other():
    method = silent(BYOL(nn.Identity(), nn.Identity(), optimizer=partial(SGD, lr=0.1), loss=lambda p, z: p * 10 + z))
    loss = method.training_step(((torch.tensor([1.0]), torch.tensor([2.0])), None), 0)
    assert loss.item() == (10 * 1 + 2) + (10 * 2 + 1)


def test_the_loss_is_computed_in_float32_whatever_the_networks_give():
    seen = []

    def loss(prediction, projection):
        seen.extend([prediction.dtype, projection.dtype])
        return (prediction - projection).square().mean(1)

    fit(tiny_method(loss=loss), pairs(1), max_epochs=1, precision="bf16-mixed")
    assert seen == [torch.float32] * 4


def test_the_target_normalizes_by_the_batch_and_keeps_its_own_statistics():
    method = tiny_method(base_tau=0.7)
    modes = []
    method.target.register_forward_hook(lambda module, *_: modes.append(module.backbone.norm.training))
    fit(method, pairs(2), [labelled(1), labelled(1)], max_epochs=2, check_val_every_n_epoch=1)
    assert modes == [True] * 8  # two views of two batches in two epochs, a validation between
    online, target = method.online.backbone.norm, method.target.backbone.norm
    assert online.num_batches_tracked == target.num_batches_tracked == 8
    assert not online.running_mean.equal(target.running_mean)


def test_the_target_gets_no_gradient_and_no_optimizer():
    method = tiny_method()
    trainer = fit(method, pairs(1), max_epochs=1)
    assert all(p.grad is None for p in method.target.parameters())
    moved = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert moved == {*method.online.parameters(), *method.predictor.parameters()}


def test_a_step_that_the_scaler_skips_leaves_online_and_target_alone(taus):
    method = tiny_method(base_tau=0.5)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    # a scale beyond float16 makes every gradient infinite: the scaler halves it and skips the step
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    fit(method, pairs(2), max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() == 2.0**58
    assert taus == []
    assert all(p.equal(before[name]) for name, p in method.named_parameters())


def test_a_step_after_one_that_the_scaler_skips_has_no_gradient_of_it(taus):
    method = tiny_method(base_tau=0.5)
    before = method.online.backbone.conv.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-60)
    fit(method, pairs(2), max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert len(taus) == 1
    after = method.online.backbone.conv.weight
    assert after.isfinite().all()
    assert not after.equal(before)


def test_the_first_direction_is_gone_when_the_second_begins():
    method = tiny_method()
    predicted, alive = [], []

    def look(module, args, prediction):
        alive.append(sum(each() is not None for each in predicted))
        predicted.append(weakref.ref(prediction))  # the loss's graph holds it

    method.predictor.register_forward_hook(look)
    fit(method, pairs(2), max_epochs=1)
    assert alive == [0, 0, 0, 0]


def test_a_step_that_the_scaler_makes_updates_the_target_once(taus):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    fit(tiny_method(base_tau=0.5), pairs(2), max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert taus == [0.5, cosine_tau(1, total_steps=2, base=0.5)]


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


@pytest.mark.parametrize(
    "optimizer", [partial(LARS, lr=1.0, trust_coefficient=0.1), partial(torch.optim.AdamW, lr=0.01)]
)
def test_stopping_and_resuming_equals_not_stopping(optimizer, taus, tmp_path):
    scheduler = partial(warmup_cosine_scheduler, init_lr=0.4, warmup_epochs=0.5, reference_batch=None)
    make = partial(tiny_method, base_tau=0.6, optimizer=optimizer, scheduler=scheduler)
    batches = pairs(4)

    straight = make()
    fit(straight, batches, max_epochs=2)
    straight_taus = taus.copy()
    taus.clear()

    stopped = fit(make(), batches, max_epochs=2, callbacks=[StopAfter(1)])
    assert stopped.global_step == 4
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make(seed=1)
    trainer = fit(resumed, batches, ckpt_path=tmp_path / "half.ckpt", max_epochs=2)

    assert trainer.global_step == 8
    assert taus == straight_taus == [cosine_tau(k, total_steps=8, base=0.6) for k in range(8)]
    for name, value in resumed.state_dict().items():
        assert value.equal(straight.state_dict()[name]), name


def test_making_a_method_runs_no_forward_pass():
    method = tiny_method()
    norms = [m for m in method.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 5
    assert all(norm.num_batches_tracked == 0 for norm in norms)


def test_the_tau_of_the_last_update_is_logged():
    trainer = fit(tiny_method(base_tau=0.5), pairs(3), max_epochs=1)
    assert trainer.logged_metrics["train/tau"].item() == pytest.approx(cosine_tau(2, total_steps=3, base=0.5))
