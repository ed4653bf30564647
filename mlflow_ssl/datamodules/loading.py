"""How batches are loaded: by how many workers, how far ahead, and from what."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data._utils.collate import collate as torch_collate
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

MOST_WORKERS = 16
"""Loader processes of one training process; more of them wait for the disk and for memory."""

MEMORY_SHARE = 0.1
"""Share of the free memory that batches may fill while they wait."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time that a container may use, and of which period."""


@dataclass(frozen=True)
class LoadingPlan:
    """What a loader is made with.

    Attributes:
        workers: loader processes; 0 loads in the main process.
        prefetch: batches that each worker keeps ready; None without workers.
        pinned: whether batches lie in page-locked memory, which GPUs are fed from faster.
    """

    workers: int
    prefetch: int | None
    pinned: bool

    def __str__(self) -> str:
        """Say it in words."""
        memory = ", pinned memory" if self.pinned else ""
        if not self.workers:
            return f"in the main process{memory}"
        return f"by {self.workers} worker{'s' * (self.workers > 1)}, {self.prefetch} batches ahead each{memory}"


def plan_loading(
    num_workers: int | str, *, cores: int, processes: int, gpu: bool, batch_bytes: int, free_bytes: int
) -> LoadingPlan:
    """Choose how to load on this machine.

    Args:
        num_workers: at most so many; ``auto``: beside a GPU all cores but the one that feeds it, else half of them,
            since the network needs the others.
        cores: that this process may use.
        processes: of the training, that share them.
        gpu: whether the network is on one.
        batch_bytes: memory of a batch.
        free_bytes: free memory of the machine, or of what workers hand batches over in if that is less.

    Example:
        >>> gpu = plan_loading("auto", cores=16, processes=2, gpu=True, batch_bytes=2**20, free_bytes=2**33)
        >>> str(gpu)
        'by 7 workers, 4 batches ahead each, pinned memory'
        >>> str(plan_loading(8, cores=2, processes=1, gpu=False, batch_bytes=2**20, free_bytes=2**33))
        'by 2 workers, 2 batches ahead each'
    """
    share = max(cores // processes, 1)
    if num_workers == "auto":
        workers = min(max(share - 1 if gpu else share // 2, 1), MOST_WORKERS)
    else:
        workers = min(int(num_workers), share)
    room = int(free_bytes * MEMORY_SHARE / processes / max(batch_bytes, 1))  # batches
    while workers > 1 and workers * 2 > room:
        workers -= 1
    if not workers:
        return LoadingPlan(0, None, gpu)
    return LoadingPlan(workers, max(1, min(4 if gpu else 2, room // workers)), gpu)


def usable_cores(quota_file: Path = CPU_QUOTA) -> int:
    """Return the processors that this process may use: by its affinity, and in a container by its share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return max(min(cores, math.ceil(int(quota) / int(period))), 1)
    except (OSError, ValueError):  # no such file, or no limit: `max`
        return cores


def free_memory() -> int:
    """Return the bytes that batches can be put in: free memory, and at most what is free of shared memory."""
    free = psutil.virtual_memory().available
    try:
        shared = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return int(free)
    return int(min(free, shared.f_bavail * shared.f_frsize / MEMORY_SHARE))


def nbytes(sample: Any) -> int:
    """Return the memory of the tensors of a sample."""
    if isinstance(sample, torch.Tensor):
        return sample.numel() * sample.element_size()
    return sum(map(nbytes, sample)) if isinstance(sample, tuple | list) else 0


def collate(samples: Sequence[Any]) -> Any:
    """Return a batch of the samples that there are; None stands for an image that was skipped.

    Raises:
        RuntimeError: if less than two are left of more: BatchNorm cannot normalize one, and the disk may be gone.
    """
    there = [sample for sample in samples if sample is not None]
    if len(there) < min(2, len(samples)):
        raise RuntimeError(
            f"{len(samples) - len(there)} of the {len(samples)} images of a batch cannot be read; is the disk there? "
            "data/bad_images.csv lists them"
        )
    return torch_collate(there, collate_fn_map=default_collate_fn_map | {Tensor: _stack})


def _stack(tensors: Sequence[Tensor], **kwargs: Any) -> Tensor:
    """Return tensors as one, in which images ``(C, H, W)`` lie as each of them does: channels last if so."""
    channels_last = tensors[0].ndim == 3 and tensors[0].stride(0) == 1
    as_they_lie = [image.permute(1, 2, 0) for image in tensors] if channels_last else tensors
    stacked: Tensor = collate_tensor_fn(as_they_lie, **kwargs)
    return stacked.permute(0, 3, 1, 2) if channels_last else stacked
