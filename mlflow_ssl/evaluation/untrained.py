"""What a network's shape alone is worth: the same network, its weights drawn anew."""

import copy
import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def untrained_copy(network: nn.Module, *, seed: int = 0) -> nn.Module:
    r"""Return a copy whose weights are drawn anew, of TorchScript or not.

    Matrices and kernels are normal with the deviation :math:`\sqrt{2 / \text{fan-in}}`, scales are 1, shifts 0, and
    BatchNorm has seen nothing. Other buffers, such as a mean that images are normalized by, stay.

    Args:
        network: in evaluation mode; not changed.
        seed: of the draw.

    References:
        He et al. 2015, arXiv:1502.01852, eq. 10.
    """
    copied = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in copied.named_parameters():
        weight.copy_(_drawn(name, weight, generator))
    for name, seen in copied.named_buffers():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            seen.fill_(1 if name.endswith("running_var") else 0)
    return copied


def _drawn(name: str, values: Tensor, generator: torch.Generator) -> Tensor:
    if values.ndim > 1:
        fan_in = max(values[0].numel(), 1)
        drawn: Tensor = torch.randn(values.shape, generator=generator) * math.sqrt(2 / fan_in)
        return drawn
    scale = name.endswith(("weight", "gamma"))
    return torch.ones_like(values) if scale else torch.zeros_like(values)
