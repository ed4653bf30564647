"""BatchNorm over the images of all processes of a training, on processors as on GPUs.

torch's own is for GPUs alone, and Lightning's conversion to it loses the activation in timm's ``BatchNormAct2d``. Here
a module stays the one that it is, with its parameters, buffers and hooks, and only its class is another while a
training lasts, as torch's parametrizations have it. So checkpoints are the same with any number of processes, and what
is exported is the plain network.
"""

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer
from pytorch_lightning.plugins import LayerSync, TorchSyncBatchNorm
from torch import Tensor, distributed, nn
from torch.nn.modules._functions import SyncBatchNorm as SharedOnGPU
from torch.nn.modules.batchnorm import _BatchNorm

from mlflow_ssl.processes import is_first_process, rank_and_world_size

log = logging.getLogger(__name__)


def pooled(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return mean and variance ``(C,)`` of groups of numbers taken together, and how many they are.

    .. math:: \mu = \sum_g \frac{n_g}{n} \mu_g, \qquad
        \sigma^2 = \sum_g \frac{n_g}{n} \left(\sigma_g^2 + (\mu_g - \mu)^2\right)

    Args:
        means: of each group, shape ``(G, C)``.
        variances: of each group, by its count and not by one less, shape ``(G, C)``.
        counts: numbers in each group, shape ``(G, 1)``.

    Example:
        >>> pooled(torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [1.0]]), torch.tensor([[1], [2]]))
        (tensor([3.]), tensor([2.6667]), tensor(3))

    References:
        Chan, Golub and LeVeque 1979, Stanford STAN-CS-79-773, eq. 1.5.
    """
    count = counts.sum()
    shares = counts / count
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    return mean, variance, count


class SharedOnCPU(torch.autograd.Function):
    """Normalize by the statistics of all processes: what torch's function does on a GPU, with the same arguments.

    Processes may have different numbers of images. One message a process goes round forward, and one backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        process_group: Any,
        world_size: int,
    ) -> Tensor:
        """Return the normalized images ``(B, C, ...)``, in their own precision, and move the running statistics."""
        mean, variance, count = _of_all_processes(images, process_group, world_size)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
        ctx.save_for_backward(images, weight, mean, variance, count)
        ctx.process_group, ctx.eps = process_group, eps
        # with statistics that are given: torch's own kernel
        scale, shift = (None if each is None else each.to(mean.dtype) for each in (weight, bias))
        return F.batch_norm(images, mean, variance, scale, shift, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        r"""Return the gradients; those of weight and bias are this process's own, and averaged with all others later.

        .. math:: \nabla x = \frac{w}{\sigma}
            \left(\nabla y - \frac{1}{n} \sum \nabla y - \frac{\hat{x}}{n} \sum \nabla y\, \hat{x}\right)
        """
        images, weight, mean, variance, count = ctx.saved_tensors
        wide = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        # by torch's own kernel for statistics that are given: the first term, and this process's two sums
        to_images, *sums = torch.ops.aten.native_batch_norm_backward(
            gradients[0], images, wide, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        to_weight, to_bias = (None if weight is None else each.to(weight.dtype, copy=True) for each in sums)
        if not ctx.needs_input_grad[0]:
            return None, to_weight, to_bias, *[None] * 6
        both = torch.stack(sums)  # (2, C)
        distributed.all_reduce(both, group=ctx.process_group)
        of_normalized, of_ones = -both / count * wide * (variance + ctx.eps).rsqrt()
        # what is left is a weight and a bias for the normalized images
        to_images += F.batch_norm(images, mean, variance, of_normalized, of_ones, training=False, eps=ctx.eps)
        return to_images, to_weight, to_bias, *[None] * 6


def _of_all_processes(images: Tensor, group: Any, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance ``(C,)`` of each channel and the count of its numbers, in float32 at least."""
    wide = torch.promote_types(images.dtype, torch.float32)
    # torch's kernel returns statistics in the type of the running ones
    running = torch.zeros(2, images.shape[1], dtype=wide)
    mean, variance = torch.batch_norm_update_stats(images, running[0], running[1], 0.0)
    count = mean.new_tensor([images.numel() // images.shape[1]])
    own = torch.cat([mean, variance, count])
    all_own = [torch.empty_like(own) for _ in range(world_size)]
    distributed.all_gather(all_own, own, group=group)
    parts = torch.split(torch.stack(all_own).double(), [len(mean), len(mean), 1], dim=1)
    mean, variance, count = (each.to(wide) for each in pooled(*parts))
    return mean, variance, count


class SharedBatchNorm(_BatchNorm):
    """What is mixed into the class of a BatchNorm module: in training it normalizes by the images of all processes."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalized images, through what timm has put behind the normalization."""
        world_size = rank_and_world_size()[1]
        if not self.training or world_size == 1:
            return super().forward(images)
        self._check_input_dim(images)  # type: ignore[no-untyped-call]
        shared: Any = SharedOnCPU if images.device.type == "cpu" else SharedOnGPU
        images = shared.apply(
            images,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self._share_of_the_new(),
            distributed.group.WORLD,
            world_size,
        )
        for behind in ("drop", "act"):
            images = getattr(self, behind, nn.Identity())(images)
        return images

    def _share_of_the_new(self) -> float:
        """Count the batch, and return its share in the running statistics."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.num_batches_tracked is None else 1.0 / float(self.num_batches_tracked)


@functools.cache
def _shared(plain: Any) -> Any:
    return type(f"Shared{plain.__name__}", (SharedBatchNorm, plain), {})


def share_batchnorm(module: nn.Module) -> int:
    """Have the BatchNorms in a module normalize by the images of all processes, in place, and return how many do.

    Those with a forward pass of their own are left alone, but for timm's.
    """
    from timm.layers.norm_act import BatchNormAct2d

    count = 0
    for each in module.modules():
        if isinstance(each, _BatchNorm) and type(each).forward in (_BatchNorm.forward, BatchNormAct2d.forward):
            plain: Any = type(each)
            each.__class__ = _shared(plain)
        count += isinstance(each, SharedBatchNorm)
    return count


def separate_batchnorm(module: nn.Module) -> None:
    """Make the BatchNorms in a module plain again, in place."""
    for each in module.modules():
        if isinstance(each, SharedBatchNorm):
            each.__class__ = type(each).__bases__[1]


def has_plain_batchnorm(module: nn.Module) -> bool:
    """Return whether some BatchNorm normalizes by the images of its own process alone."""
    shared = (SharedBatchNorm, nn.SyncBatchNorm)
    return any(isinstance(each, _BatchNorm) and not isinstance(each, shared) for each in module.modules())


class BatchNormSync(LayerSync):
    """Has Lightning share the BatchNorms of a method while it is trained."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Share them; Lightning calls this before a training that may have several processes."""
        count, processes = share_batchnorm(model), rank_and_world_size()[1]
        if count and processes > 1 and is_first_process():
            log.info("BatchNorm normalizes by the images of all %d processes", processes)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Make them plain again; Lightning calls this when the training is over, however it ends."""
        separate_batchnorm(model)
        return model


def use_batchnorm_sync(trainer: Trainer) -> None:
    """Have a trainer that was told ``sync_batchnorm`` do it in this way, unless it has a plugin of its own for that."""
    strategy: Any = trainer.strategy
    if type(getattr(strategy, "_layer_sync", None)) is TorchSyncBatchNorm:
        strategy._layer_sync = BatchNormSync()
