"""LARS, and which parameters an optimizer decays."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def parameter_groups(*modules: nn.Module) -> list[dict[str, Any]]:
    """Split trainable parameters into those decayed and adapted, and biases and norms, which are neither.

    Returns:
        Two groups for any torch optimizer; ``adapt`` is read by LARS alone.

    References:
        Grill et al. 2020, arXiv:2006.07733, sec. 3.3.
    """
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    weights = [p for p in trainable if p.ndim > 1]
    vectors = [p for p in trainable if p.ndim <= 1]  # biases, norm scales and shifts
    return [{"params": weights}, {"params": vectors, "weight_decay": 0.0, "adapt": False}]


class LARS(Optimizer):
    r"""Layer-wise adaptive rate scaling, as BYOL's reference code has it.

    .. math::
        d &= g + \lambda w, \qquad r = \eta \lVert w \rVert / \lVert d \rVert \\
        v &\leftarrow \mu v + r d, \qquad w \leftarrow w - \gamma v

    Weight decay comes before the trust ratio :math:`r`, which is 1 where either norm is 0 and in groups with
    ``adapt`` false. timm's ``Lars`` divides by the sum of the norms of gradient and decay instead of the norm of
    their sum, and stops adapting where the decay is 0: a different optimizer. All tensors of a group move in a few
    fused kernels.

    With ``clip`` the ratio is :math:`\min(r / \gamma, 1)`: the rate bounds the step, and the ratio can only shorten it.

    Args:
        params: parameters or groups; a group may set ``adapt: False``.
        lr: learning rate :math:`\gamma`.
        momentum: :math:`\mu`, in [0, 1).
        weight_decay: :math:`\lambda`.
        trust_coefficient: :math:`\eta`.
        nesterov: step along :math:`r d + \mu v` instead of :math:`v`.
        clip: take the learning rate for the most that a ratio may come to, as LARC and solo-learn do.

    References:
        You et al. 2017, arXiv:1708.03888; Grill et al. 2020, arXiv:2006.07733, sec. 3.3 and its reference code;
        ``clip``: da Costa et al. 2022, solo-learn, JMLR 23(56), its ``clip_lr``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        clip: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "nesterov": nesterov,
                "clip": clip,
                "adapt": True,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _step_group(group, self.state)
        return loss


def _step_group(group: dict[str, Any], state: dict[Tensor, Any]) -> None:
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    grads = [p.grad for p in params]
    updates = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    if group["adapt"]:
        most = group["lr"] if group.get("clip") else None  # checkpoints from before the option have none
        torch._foreach_mul_(updates, _trust_ratios(params, updates, group["trust_coefficient"], most=most))
    for p in params:
        if "velocity" not in state[p]:
            state[p]["velocity"] = torch.zeros_like(p)
    velocities = [state[p]["velocity"] for p in params]
    torch._foreach_mul_(velocities, group["momentum"])
    torch._foreach_add_(velocities, updates)
    if group["nesterov"]:
        torch._foreach_add_(updates, velocities, alpha=group["momentum"])
    torch._foreach_add_(params, updates if group["nesterov"] else velocities, alpha=-group["lr"])


def _trust_ratios(
    params: list[Tensor], updates: list[Tensor], coefficient: float, *, most: float | None
) -> list[Tensor]:
    """Return one ratio per tensor, on the device: no value is read back to the host.

    Where there is a learning rate ``most``, a ratio is a share of it, at most 1.
    """
    weight_norms = torch.stack(list(torch._foreach_norm(params)))  # (T,)
    update_norms = torch.stack(list(torch._foreach_norm(updates)))  # (T,)
    ratios = coefficient * weight_norms / update_norms
    if most is not None:
        ratios = (ratios / most).clamp(max=1)  # 1 at a rate of 0, where a warm-up begins
    usable = (weight_norms > 0) & (update_norms > 0)
    return list(torch.where(usable, ratios, torch.ones_like(ratios)).unbind())
