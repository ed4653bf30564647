"""The target network: a slow copy of the online one."""

import copy
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_as_target(online: ModuleT) -> ModuleT:
    """Return a copy of ``online`` that receives no gradient."""
    return copy.deepcopy(online).requires_grad_(requires_grad=False)


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, *, tau: float) -> None:
    r"""Move every parameter of ``target`` a little towards ``online``, in place.

    .. math:: \xi \leftarrow \tau \xi + (1 - \tau) \theta

    Buffers are left alone: the target keeps its own BatchNorm statistics.

    Args:
        target: the slow network.
        online: the trained network, of the same architecture.
        tau: share of the old target that is kept, in [0, 1].

    Example:
        >>> slow, fast = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(slow.weight, 0.0), nn.init.constant_(fast.weight, 1.0)
        >>> update_target(slow, fast, tau=0.75)
        >>> slow.weight.item()
        0.25

    References:
        Grill et al. 2020, arXiv:2006.07733, eq. 1.
    """
    # one fused kernel for all tensors: four times a Python loop over them
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - tau)
