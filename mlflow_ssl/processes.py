"""Processes that share a training: how they meet, and what they tell each other.

Lightning starts the other processes of a machine itself, when the first is well under way; they inherit what they need
to know. Those that torchrun, Slurm or Ray has started all begin at once: they `join` first. What is told, all of them
call for, in the same order.
"""

import datetime
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, distributed, nn

from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

PIECE = 2**22
"""Numbers that travel at once, and for which there is room on the device."""

T = TypeVar("T")


def is_first_process() -> bool:
    """Return whether this process is the one that talks to MLflow and writes the output folder."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def join(*, gpu: bool, timeout_seconds: float = 1800) -> None:
    """Make the group of the processes that a launcher has started at once; Lightning takes it over.

    Does nothing where there is one already, as on Ray, or where this process is the only one so far.

    Args:
        gpu: whether they train on GPUs.
        timeout_seconds: how long one waits for another.

    Raises:
        InputError: if the others do not come.
    """
    cluster = _cluster()
    if distributed.is_initialized() or cluster is None or cluster.world_size() < 2:
        return
    os.environ.setdefault("MASTER_ADDR", cluster.main_address)
    os.environ.setdefault("MASTER_PORT", str(cluster.main_port))
    rank_zero_only.rank = cluster.global_rank()  # type: ignore[attr-defined]
    if gpu:
        torch.cuda.set_device(cluster.local_rank() % max(torch.cuda.device_count(), 1))
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            rank=cluster.global_rank(),
            world_size=cluster.world_size(),
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
    except distributed.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"the {cluster.world_size()} processes of this training must meet at {address}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    log.debug("process %d of %d", cluster.global_rank(), cluster.world_size())


def launched() -> tuple[int, int]:
    """Return the number of this process, and how many there are, as far as is known when it begins.

    A process that Lightning has yet to make the first of several is alone so far.
    """
    if distributed.is_initialized():
        return rank_and_world_size()
    cluster = _cluster()
    if cluster is not None:
        return cluster.global_rank(), cluster.world_size()
    if is_first_process() or os.environ.get("NODE_RANK", "0") != "0":
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def fit_to_processes(trainer: DictConfig) -> None:
    """Have Lightning take the processes that torchrun or Ray has started, in place of the config's ``devices``."""
    if "LOCAL_WORLD_SIZE" not in os.environ or not (TorchElasticEnvironment.detect() or distributed.is_initialized()):
        return
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    trainer.devices, trainer.num_nodes = local, world // local
    if trainer.strategy == "auto" and world > 1:
        trainer.strategy = "ddp"


def _cluster() -> ClusterEnvironment | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")  # as it is beside other launchers too
        for environment in (TorchElasticEnvironment, SLURMEnvironment):
            if environment.detect():
                found: ClusterEnvironment = environment()
                return found
    return None


def from_first(make: Callable[[], T]) -> T:
    """Return in every process what the first one makes; alone, that is this one.

    Raises:
        InputError: in all of them, if the first one does.
    """
    if not distributed.is_initialized() or distributed.get_world_size() < 2:
        return make()
    told: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            told[0] = make()
        except InputError as error:
            told[1] = str(error)
            distributed.broadcast_object_list(told, src=0)
            raise
    distributed.broadcast_object_list(told, src=0)
    made, mistake = told
    if mistake is not None:
        raise InputError(mistake)
    return made  # type: ignore[no-any-return]


def rank_and_world_size() -> tuple[int, int]:
    """Return the number of this process, and how many the training has."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def joined(part: Tensor, device: torch.device, *, everywhere: bool = True) -> Tensor:
    """Return the rows of all processes, those of the first process first.

    Args:
        part: the rows of this process, shape ``(N, ...)``; only ``N`` may differ among the processes, and may be 0.
        device: that processes speak through: the training's.
        everywhere: whether all processes want the rows; otherwise the others than the first get none of them.

    Returns:
        The rows, where ``part`` lies.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return part
    counts = torch.zeros(world_size, dtype=torch.long, device=device)
    counts[rank] = len(part)
    torch.distributed.all_reduce(counts)
    wanted = everywhere or rank == 0
    whole = part.new_empty(int(counts.sum()) if wanted else 0, *part.shape[1:])
    most = max(PIECE // max(part.shape[1:].numel(), 1), 1)
    start = 0
    for source, count in enumerate(counts.tolist()):
        for begin in range(0, count, most):
            rows = min(most, count - begin)
            if source == rank:
                piece = part[begin : begin + rows].to(device).contiguous()
            else:
                piece = torch.empty(rows, *part.shape[1:], dtype=part.dtype, device=device)
            torch.distributed.broadcast(piece, src=source)
            if wanted:
                whole[start + begin : start + begin + rows] = piece.to(whole.device)
        start += count
    return whole


def averaged(numbers: Tensor) -> Tensor:
    """Return the mean over all processes of numbers that each has: one message, and no barrier before it.

    Args:
        numbers: of this process, on the device that processes speak through; the same shape in all.
    """
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return numbers
    total = numbers.detach().clone()
    torch.distributed.all_reduce(total)
    return total / world_size


def agree_on_buffers(module: nn.Module) -> None:
    """Give all processes the buffers of the first, in place: each has BatchNorm statistics of its own images."""
    if rank_and_world_size()[1] > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
