"""What the processes of a training tell each other: all of them call these functions, in the same order."""

import torch
from torch import Tensor, nn

PIECE = 2**22
"""Numbers that travel at once, and for which there is room on the device."""


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


def agree_on_buffers(module: nn.Module) -> None:
    """Give all processes the buffers of the first, in place: each has BatchNorm statistics of its own images."""
    if rank_and_world_size()[1] > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
