"""What is done to a view last: its bytes become what a network takes, in batches, on the training device."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


class Normalize:
    """Normalize the views that the loader's workers hand over as bytes, which are a quarter of what float32 would be.

    Views that are no bytes stay as they are: the worker's transforms have seen to them.

    Args:
        mean: of each channel, as a share of 255.
        std: likewise.
    """

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]) -> None:
        spread = torch.tensor(std)
        self.scale = tuple((1 / (255 * spread)).tolist())
        self.shift = tuple((-torch.tensor(mean) / spread).tolist())

    def __call__(self, images: Tensor, *_: object, **__: object) -> Tensor:
        """Return ``(images / 255 - mean) / std``, float32 of shape ``(B, 3, H, W)``, channels last in memory."""
        if images.dtype != torch.uint8:
            return images
        width = images.shape[3]
        scale, shift = (_row(values, width, images.device) for values in (self.scale, self.shift))
        rows = images.permute(0, 2, 3, 1).flatten(2)  # (B, H, 3 W): a loop over three channels would be slow
        normalized = rows.float().mul_(scale).add_(shift)
        return normalized.view(*rows.shape[:2], width, 3).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=64)
def _row(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """Return the values once for each pixel of a row; they are sent to the device once."""
    return torch.tensor(values).repeat(width).to(device)
