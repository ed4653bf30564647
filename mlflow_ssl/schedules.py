"""Numbers that change with the optimizer step, and the scheduler that applies them.

Steps are optimizer steps, counted from 0; an epoch is as many steps as the loader gives batches, divided by the
accumulation of gradients.
"""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mlflow_ssl.errors import InputError


def cosine_tau(step: int, *, total_steps: int, base: float) -> float:
    r"""Return the share of the old target kept at ``step``: ``base`` at first, 1 at the end.

    .. math:: \tau = 1 - (1 - \tau_\mathrm{base}) (\cos(\pi k / K) + 1) / 2

    Args:
        step: optimizer step ``k``; beyond ``total_steps`` it stays at the end.
        total_steps: length ``K`` of the training in optimizer steps, at least 1.
        base: tau at step 0, in [0, 1].

    Example:
        >>> [round(cosine_tau(k, total_steps=2, base=0.9), 3) for k in (0, 1, 2)]
        [0.9, 0.95, 1.0]

    References:
        Grill et al. 2020, arXiv:2006.07733, sec. 3.3.
    """
    return 1 - (1 - base) * (math.cos(math.pi * min(step / max(total_steps, 1), 1)) + 1) / 2


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, final_factor: float = 0.0) -> float:
    """Return the share of the peak learning rate at ``step``: a line up from 0, then half a cosine.

    Args:
        step: optimizer step, from 0.
        total_steps: length of the training in optimizer steps.
        warmup_steps: length of the line, in optimizer steps; the peak is reached there.
        final_factor: share of the peak left at ``total_steps``, in [0, 1].

    Example:
        >>> [warmup_cosine(k, total_steps=8, warmup_steps=4) for k in (0, 2, 4, 8)]
        [0.0, 0.5, 1.0, 0.0]

    References:
        Grill et al. 2020, arXiv:2006.07733, sec. 3.3; cosine: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """
    if step < warmup_steps:
        return step / warmup_steps
    # a training no longer than its warm-up has no cosine to walk down
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1)
    return final_factor + (1 - final_factor) * (math.cos(math.pi * done) + 1) / 2


def scaled_lr(init_lr: float, *, global_batch: int, reference_batch: int | None) -> float:
    """Return the learning rate for a global batch: linear in it, or unchanged without a reference.

    Example:
        >>> scaled_lr(0.4, global_batch=512, reference_batch=256)
        0.8

    References:
        Goyal et al. 2017, arXiv:1706.02677, sec. 2.1.
    """
    return init_lr if reference_batch is None else init_lr * global_batch / reference_batch


def peak_lr(init_lr: float | Sequence[float]) -> float:
    """Return ``scheduler.init_lr`` as one number; the tutorial spells it as a list of one.

    Raises:
        InputError: if it is a list of any other length.
    """
    if not isinstance(init_lr, Sequence):
        return float(init_lr)
    if len(init_lr) != 1:
        raise InputError(f"scheduler.init_lr must be one number or a list of one, got {list(init_lr)}")
    return float(init_lr[0])


def warmup_cosine_scheduler(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: float,
    global_batch: int,
    init_lr: float | Sequence[float],
    warmup_epochs: float = 10,
    final_factor: float = 0.0,
    reference_batch: int | None = 256,
) -> LambdaLR:
    """Give every parameter group of ``optimizer`` the warm-up and cosine schedule, per optimizer step.

    Args:
        optimizer: its groups' own learning rates are replaced; a group's ``lr_scale`` multiplies its.
        total_steps: length of the training in optimizer steps.
        steps_per_epoch: optimizer steps in one epoch.
        global_batch: images per optimizer step, over all devices and accumulated batches.
        init_lr: peak learning rate at ``reference_batch`` images per step.
        warmup_epochs: length of the warm-up in epochs; at most the whole training.
        final_factor: share of the peak left at the end, in [0, 1].
        reference_batch: images per step that ``init_lr`` is meant for; None leaves it as it is.
    """
    peak = scaled_lr(peak_lr(init_lr), global_batch=global_batch, reference_batch=reference_batch)
    for group in optimizer.param_groups:
        group["lr"] = peak * group.get("lr_scale", 1.0)
    warmup_steps = min(round(warmup_epochs * steps_per_epoch), total_steps)

    def factor(step: int) -> float:
        return warmup_cosine(step, total_steps=total_steps, warmup_steps=warmup_steps, final_factor=final_factor)

    return LambdaLR(optimizer, factor)
