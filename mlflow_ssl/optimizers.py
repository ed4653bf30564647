"""LARS, and which parameters an optimizer decays."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

BLOCK = 256
"""Values of a row of the buffer that updates are scaled in; the last row of a tensor is filled up."""
IN_CACHE = 2**20
"""Values that a CPU moves at once: what it works on is then in its cache from the first pass to the last."""


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


def scale_rates(optimizer: Optimizer) -> None:
    """Multiply the learning rate of each group of ``optimizer`` by the group's ``lr_scale``, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)


class LARS(Optimizer):
    r"""Layer-wise adaptive rate scaling, as BYOL's reference code has it.

    .. math::
        d &= g + \lambda w, \qquad r = \eta \lVert w \rVert / \lVert d \rVert \\
        v &\leftarrow \mu v + r d, \qquad w \leftarrow w - \gamma v

    Weight decay comes before the trust ratio :math:`r`, which is 1 where either norm is 0 and in groups with
    ``adapt`` false. timm's ``Lars`` divides by the sum of the norms of gradient and decay instead of the norm of
    their sum, and stops adapting where the decay is 0: a different optimizer. All tensors of a group move in a few
    fused kernels, whose number does not depend on that of the tensors. Of tensors that are shared among processes, each
    moves its part, by the norms of the whole.

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
        self._space = Tensor()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _parcels([p for p in group["params"] if p.grad is not None]):
                _move(params, group, self.state, self._rows(list(map(_part, params))))
        return loss

    def _rows(self, params: list[Tensor]) -> Tensor:
        """Return a buffer ``(R, BLOCK)`` for updates; a CPU keeps it, as the pages of new memory are zeroed first."""
        size = sum(map(_num_rows, params)) * BLOCK
        first = params[0]
        if first.device.type != "cpu":
            return first.new_empty(size).view(-1, BLOCK)
        if self._space.dtype != first.dtype or self._space.numel() < size:
            self._space = first.new_empty(size)
        return self._space[:size].view(-1, BLOCK)


def _parcels(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors that are moved at once: of one kind, and on a CPU as many as its cache holds.

    Where processes share the tensors, all of them have the same parcels.
    """
    alike: dict[tuple[torch.device, torch.dtype, DeviceMesh | None], list[Tensor]] = {}
    for p in params:
        parcel = alike.setdefault((p.device, p.dtype, _sharers(p)), [])
        if parcel and p.device.type == "cpu" and sum(each.numel() for each in parcel) + p.numel() > IN_CACHE:
            yield parcel[:]
            parcel.clear()
        parcel.append(p)
    yield from alike.values()


def _move(params: list[Tensor], group: dict[str, Any], state: dict[Tensor, Any], rows: Tensor) -> None:
    parts = list(map(_part, params))
    updates = _laid_out(parts, rows)
    torch._foreach_copy_(updates, [_part(p.grad) for p in params if p.grad is not None])
    if group["weight_decay"]:
        torch._foreach_add_(updates, parts, alpha=group["weight_decay"])
    if group["adapt"]:
        most = group["lr"] if group.get("clip") else None  # checkpoints from before the option have none
        ratios = _trust_ratios(parts, updates, group["trust_coefficient"], most=most, sharers=_sharers(params[0]))
        # a row has one factor: `_foreach_mul_` by a list of numbers would be a kernel a tensor
        rows.mul_(ratios.index_select(0, _owners(tuple(map(_num_rows, parts)), rows.device))[:, None])
    torch._fused_sgd_(
        *(list(map(_flat, tensors)) for tensors in (parts, updates, [_velocity(p, state[p]) for p in params])),
        weight_decay=0.0,  # is in the updates
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
        is_first_step=False,
    )


def _velocity(p: Tensor, state: dict[str, Any]) -> Tensor:
    """Return this process's part of a parameter's velocity, laid out in memory as the parameter is."""
    velocity = state.get("velocity")
    if velocity is None:
        velocity = state["velocity"] = torch.zeros_like(p)
    elif velocity.stride() != p.stride():  # goes on from a checkpoint of weights that lay otherwise
        velocity = state["velocity"] = torch.empty_like(p).copy_(velocity)
    return _part(velocity)


def _part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor: all of it, unless the training is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharers(p: Tensor) -> DeviceMesh | None:
    """Return the processes that each have a part of a tensor; None where it is whole."""
    return p.device_mesh if isinstance(p, DTensor) else None


def _laid_out(params: list[Tensor], rows: Tensor) -> list[Tensor]:
    """Return a view on a buffer for each tensor, laid out in memory as the tensor is."""
    views, start = [], 0
    for p in params:
        views.append(rows.as_strided(p.shape, p.stride(), start))
        start += _num_rows(p) * BLOCK
    return views


def _flat(tensor: Tensor) -> Tensor:
    """Return the values as they lie in memory: the fused kernel of a CPU copies what is not contiguous first."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _num_rows(p: Tensor) -> int:
    return -(-p.numel() // BLOCK)


@functools.lru_cache(maxsize=64)
def _owners(num_rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the number of the tensor that each row of a buffer belongs to, ``(R,)``; sent to the device once."""
    return torch.repeat_interleave(torch.tensor(num_rows)).to(device)


def _trust_ratios(
    params: list[Tensor], updates: list[Tensor], coefficient: float, *, most: float | None, sharers: DeviceMesh | None
) -> Tensor:
    """Return one ratio per tensor, ``(T,)``, on the device: no value is read back to the host.

    Where there is a learning rate ``most``, a ratio is a share of it, at most 1.
    """
    norms = torch.stack(torch._foreach_norm([*params, *updates])).view(2, -1)
    if sharers is not None:
        squares = norms.square()
        torch.distributed.all_reduce(squares, group=sharers.get_group())
        norms = squares.sqrt()
    weight_norms, update_norms = norms
    ratios = coefficient * weight_norms / update_norms
    if most is not None:
        ratios = (ratios / most).clamp(max=1)  # 1 at a rate of 0, where a warm-up begins
    return torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)
