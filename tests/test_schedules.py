import math

import pytest
import torch
from torch import nn

from mlflow_ssl.errors import InputError
from mlflow_ssl.schedules import cosine_tau, peak_lr, scaled_lr, warmup_cosine, warmup_cosine_scheduler

# (cos(pi k / 9) + 1) / 2 for k = 0..9, written out
HALF_COSINE_9 = [1.0, 0.9698463, 0.8830222, 0.75, 0.5868241, 0.4131759, 0.25, 0.1169778, 0.0301537, 0.0]


def rates(optimizer, scheduler, steps):
    """Return the rate of every group at each of ``steps`` optimizer steps."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("base", [0.9, 0.996])
def test_cosine_tau_at_ten_points(base):
    taus = [cosine_tau(k, total_steps=9, base=base) for k in range(10)]
    assert taus == pytest.approx([1 - (1 - base) * share for share in HALF_COSINE_9], abs=1e-7)


def test_cosine_tau_begins_at_base_and_stays_1_beyond_the_end():
    assert cosine_tau(0, total_steps=7, base=0.97) == 0.97
    assert [cosine_tau(k, total_steps=7, base=0.97) for k in (7, 8, 100)] == [1.0, 1.0, 1.0]


def test_warmup_cosine_at_ten_points():
    factors = [warmup_cosine(k, total_steps=10, warmup_steps=4) for k in range(1, 11)]
    written = [0.25, 0.5, 0.75, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873, 0.0]
    assert factors == pytest.approx(written, abs=1e-7)


def test_warmup_cosine_begins_at_0():
    assert warmup_cosine(0, total_steps=10, warmup_steps=4) == 0.0


def test_warmup_cosine_without_warmup_begins_at_the_peak():
    assert [warmup_cosine(k, total_steps=2, warmup_steps=0) for k in (0, 1, 2)] == pytest.approx([1.0, 0.5, 0.0])


def test_warmup_cosine_ends_at_the_final_factor_and_stays_there():
    factors = [warmup_cosine(k, total_steps=9, warmup_steps=0, final_factor=0.1) for k in range(10)]
    assert factors == pytest.approx([0.1 + 0.9 * share for share in HALF_COSINE_9], abs=1e-7)
    assert warmup_cosine(50, total_steps=9, warmup_steps=0, final_factor=0.1) == pytest.approx(0.1)


def test_warmup_cosine_as_long_as_the_training_does_not_divide_by_zero():
    factors = [warmup_cosine(k, total_steps=4, warmup_steps=4) for k in range(6)]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert math.isfinite(factors[5])


@pytest.mark.parametrize(("batch", "reference", "lr"), [(512, 256, 0.8), (64, 256, 0.1), (512, None, 0.4)])
def test_scaled_lr_is_linear_in_the_batch_unless_there_is_no_reference(batch, reference, lr):
    assert scaled_lr(0.4, global_batch=batch, reference_batch=reference) == pytest.approx(lr)


@pytest.mark.parametrize("init_lr", [0.2, [0.2], (0.2,)])
def test_peak_lr_takes_a_number_or_a_list_of_one(init_lr):
    assert peak_lr(init_lr) == 0.2


@pytest.mark.parametrize("init_lr", [[], [0.1, 0.2]])
def test_peak_lr_refuses_any_other_list(init_lr):
    with pytest.raises(InputError, match=r"scheduler\.init_lr must be one number or a list of one, got \["):
        peak_lr(init_lr)


def two_groups():
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 7.0} for _ in range(2)], lr=7.0)


def test_the_scheduler_sets_the_rate_of_every_group_at_each_optimizer_step():
    optimizer = two_groups()
    scheduler = warmup_cosine_scheduler(
        optimizer, total_steps=10, steps_per_epoch=2, global_batch=128, init_lr=[0.4], warmup_epochs=2
    )
    expected = [0.2 * warmup_cosine(k, total_steps=10, warmup_steps=4) for k in range(10)]
    seen = rates(optimizer, scheduler, 10)
    assert [first for first, _ in seen] == pytest.approx(expected)
    assert [second for _, second in seen] == pytest.approx(expected)


@pytest.mark.parametrize("warmup_epochs", [5, 50])
def test_the_scheduler_caps_the_warmup_at_the_training(warmup_epochs):
    optimizer = two_groups()
    scheduler = warmup_cosine_scheduler(
        optimizer, total_steps=5, steps_per_epoch=1, global_batch=256, init_lr=1.0, warmup_epochs=warmup_epochs
    )
    assert [first for first, _ in rates(optimizer, scheduler, 6)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
