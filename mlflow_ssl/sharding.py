"""Networks whose weights, gradients and optimizer state are dealt out to the processes of a training.

Each process holds a part of every tensor, and the whole weights of a block only while it computes with them. The parts
are torch's `fully_shard`; what makes wholes of them, and parts of wholes, is here.

References:
    Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO, stage 3); Zhao et al. 2023, arXiv:2304.11277 (FSDP).
"""

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")
"""Of a training whose weights are shared: no loss is scaled in it."""
NOT_COMPILED = (
    "model.compile must be false with trainer=lightning_fsdp, whose processes gather weights between the operations of "
    "a network"
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Leave this process its part of a network's weights, in place; does nothing to a network that is sharded.

    Args:
        network: which is called as a whole. All processes have the same.
        mesh: the processes, in one dimension.
    """
    if isinstance(network, FSDPModule):
        return
    for unit in [*blocks(network), network]:
        # by default the outermost weights stay whole after a forward pass, for a backward pass that a target never has
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network: what stands in a row of its own kind, inner ones first.

    Example:
        >>> stages = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)))
        >>> [type(block).__name__ for block in blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), stages))]
        ['Linear', 'Linear', 'Linear', 'Linear', 'Linear', 'Linear', 'Sequential', 'Sequential', 'Sequential']
    """
    rows = [list(each.children()) for each in network.modules() if isinstance(each, nn.Sequential | nn.ModuleList)]
    alike = [row for row in rows if len(row) > 1 and len(set(map(type, row))) == 1]
    # modules come after those that they are in
    return [block for row in reversed(alike) for block in row if any(True for _ in block.parameters())]


def is_sharded(module: nn.Module) -> bool:
    """Return whether some weights of a module are parts."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


# wholes of parts


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict as if it were not sharded, on the CPU.

    All processes call for it; only the first gets it, and the others nothing.
    """
    return _gathered(module.state_dict())  # type: ignore[no-any-return]


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict as if its parameters were not sharded; see `whole_state`."""
    return _gathered(optimizer.state_dict())  # type: ignore[no-any-return]


def _gathered(tree: Any) -> Any:
    """Return nested values with whole tensors on the CPU; in other processes than the first, empty containers."""
    first = torch.distributed.get_rank() == 0
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()  # one at a time: there may be no room for all of them on the device
        return whole.cpu() if first else None
    if isinstance(tree, Tensor):
        return tree.cpu() if first else None
    if isinstance(tree, Mapping):
        parts = {key: _gathered(value) for key, value in tree.items()}
        return parts if first else {}
    if isinstance(tree, list | tuple):
        values = [_gathered(value) for value in tree]  # by all: each gathering takes all of them
        return type(tree)(values if first else ())
    return tree


# parts of wholes


def load_whole(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load a state dict of whole tensors into a module, sharded or not; no process speaks to another."""
    own = module.state_dict()
    module.load_state_dict({name: _part(value, own.get(name)) for name, value in state.items()}, strict=strict)


def load_whole_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state dict of whole tensors, likewise."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers = chain.from_iterable(group["params"] for group in state["param_groups"])
    of = dict(zip(numbers, parameters, strict=False))  # torch says in what two optimizers differ
    dealt = {
        number: {name: _part(value, of.get(number)) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": dealt})


def _part(value: Any, like: Tensor | None) -> Any:
    """Return this process's part of a whole tensor, as ``like`` is one; other values as they are."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # each process has the whole, and sends nothing; a copy, as the part is a view that would keep all of it
    return distribute_tensor(value.contiguous(), like.device_mesh, like.placements, src_data_rank=None).clone()


# a module with whole weights beside a sharded one


def without_weights(module: ModuleT) -> ModuleT:
    """Return a copy of a module whose weights have a shape and take no memory."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def made_whole(module: ModuleT, blank: ModuleT) -> ModuleT:
    """Return a sharded module with its whole weights on the CPU; one that is not sharded as it is.

    Args:
        module: all processes call for it.
        blank: the same `without_weights`, from before it was sharded; the first process's becomes what is returned,
            the others' have nothing.
    """
    if not is_sharded(module):
        return module
    state = whole_state(module)
    if state:
        blank.load_state_dict(state, assign=True)
    return blank


class ShardedStrategy(ModelParallelStrategy):
    """Share weights, gradients and optimizer state among all processes of a training.

    A method says in ``configure_model`` what is sharded. Checkpoints are those of every other strategy, one file with
    whole tensors, so that any number of processes goes on from them, with this strategy or without.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Meet the other processes."""
        self._data_parallel_size = self.world_size  # is not known before; by default Lightning takes one a machine
        super().setup_environment()
        self._synchronize_batchnorm()

    def _synchronize_batchnorm(self) -> None:
        """Do what ``sync_batchnorm`` asks for: Lightning does not under this strategy, and it has to come first."""
        module = self.lightning_module
        if self._layer_sync is not None and module is not None and not is_sharded(module):
            self._layer_sync.apply(module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights, in the first process."""
        assert self.lightning_module is not None
        return whole_state(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's whole state, in the first process."""
        return whole_optimizer_state(getattr(optimizer, "optimizer", optimizer))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint as every other strategy does."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of the weights."""
        assert self.lightning_module is not None
        load_whole(self.lightning_module, checkpoint["state_dict"], strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Have Lightning call `load_optimizer_state_dict`."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of the optimizers' state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_whole_optimizer(optimizer, state)
