"""Views finished in batches, on the device that the network is trained on.

The loader's workers only decode and crop. Pure functions of images ``(B, 3, H, W)``, values in [0, 1], and one number
an image; and `DeviceViews`, which draws the numbers. They are torchvision's operations, which know one number a batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = (0.2989, 0.587, 0.114)
"""Luminance of red, green and blue: ITU-R BT.601, as torchvision has it."""


def grey(images: Tensor) -> Tensor:
    """Return the luminance ``(B, 1, H, W)``."""
    red, green, blue = images.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue).unsqueeze(1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Return ``factor * image``, clamped; ``factor`` has the shape ``(B,)``, here and below."""
    return (images * _each(factor)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Return each image blended with its mean luminance."""
    return _blend(images, grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Return each image blended with its luminance."""
    return _blend(images, grey(images), factor)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Return each image with its hue turned by a share of the circle.

    Value and chroma stay, so a channel is ``value - chroma * max(0, min(k, 4 - k, 1))`` with ``k = (n + 6 hue) mod 6``
    and ``n`` = 5, 3, 1 for red, green and blue.

    References:
        https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    """
    value, largest = images.max(1)  # (B, H, W)
    chroma = value - images.amin(1)
    red, green, blue = images.unbind(1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.stack([(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], dim=1)
    hue = sixths.gather(1, largest.unsqueeze(1)) + 6 * _each(turn)  # (B, 1, H, W)
    offset = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    position = (offset + hue) % 6
    share = torch.minimum(position, 4 - position).clamp(0, 1)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * share


def gaussian_blur(images: Tensor, sigma: Tensor, *, taps: int) -> Tensor:
    """Return each image convolved with a Gaussian of its own standard deviation, in pixels, reflected at the borders.

    Args:
        images: shape ``(B, 3, H, W)``, sides longer than half of ``taps``.
        sigma: above 0, shape ``(B,)``.
        taps: values of the kernel, odd.
    """
    count, channels, height, width = images.shape
    half = taps // 2
    places = torch.arange(-half, half + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (places / sigma[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (3 B, taps)
    planes = F.pad(images, (half, half, half, half), mode="reflect").view(1, count * channels, -1, width + 2 * half)
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=count * channels)
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=count * channels)
    return planes.view(count, channels, height, width)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Return the images with all values from ``threshold`` on inverted."""
    return torch.where(images >= threshold, 1 - images, images)


class DeviceViews:
    """Finish one view of each image of a batch: flip, jitter, grey, blur, solarize, normalize.

    All random numbers are drawn on the host, so nothing waits for the device, and a view depends on the generator
    alone, whatever the device.

    Args:
        mean: of each channel, as a share of 1.
        std: likewise.
        flip: probability of a horizontal flip.
        jitter: probability that the colours are jittered, in an order of their own for each image.
        brightness: the factor is drawn from [1 - brightness, 1 + brightness].
        contrast: likewise.
        saturation: likewise.
        hue: the turn is drawn from [-hue, hue], as a share of the circle.
        grey: probability that only the luminance is left.
        blur: probability of a Gaussian blur.
        sigma: bounds of its standard deviation, pixels.
        most_taps: values of its kernel, at most; it ends at three standard deviations.
        solarize: probability of inverting what is above ``threshold``.
        threshold: as a share of 1.

    References:
        Grill et al. 2020, arXiv:2006.07733, app. B, table 6.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        flip: float = 0.5,
        jitter: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        grey: float = 0.2,
        blur: float = 1.0,
        sigma: Sequence[float] = (0.1, 2.0),
        most_taps: int = 23,
        solarize: float = 0.0,
        threshold: float = 128 / 255,
    ) -> None:
        probabilities = {"flip": flip, "jitter": jitter, "grey": grey, "blur": blur, "solarize": solarize}
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability, got {value}")
        self.mean, self.std = list(mean), list(std)
        self.probabilities = probabilities
        self.strengths = (brightness, contrast, saturation, hue)
        self.sigma = (float(sigma[0]), float(sigma[1]))
        self.taps = min(2 * math.ceil(3 * self.sigma[1]) + 1, most_taps)
        self.threshold = threshold

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the views, normalized, float32 of shape ``(B, 3, H, W)``.

        Args:
            images: bytes 0..255 or numbers in [0, 1], shape ``(B, 3, H, W)``.
            generator: on the host.
        """
        with torch.autocast(images.device.type, enabled=False):
            images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
            for operation, rows, numbers in self._draw(len(images), generator):
                # only the rows that were drawn, and their numbers are on their way before the device asks for them
                rows, numbers = (drawn.to(images.device, non_blocking=True) for drawn in (rows, numbers))
                images = images.index_copy(0, rows, operation(images[rows], numbers))
            mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
            return (images - mean) / std

    def _draw(self, count: int, generator: torch.Generator) -> list[tuple[Callable[..., Tensor], Tensor, Tensor]]:
        """Return what is done, one after the other: an operation, the rows it is done to, and its number for each."""
        chosen = {
            name: torch.rand(count, generator=generator) < probability
            for name, probability in self.probabilities.items()
        }
        numbers = torch.rand(5, count, generator=generator)
        order = torch.rand(count, 4, generator=generator).argsort(1)
        low, high = self.sigma
        sigma = low + (high - low) * numbers[4]
        steps: list[tuple[Callable[..., Tensor], Tensor, Tensor]] = [(_flipped, chosen["flip"], numbers[0])]
        for place in range(4):
            steps += [
                (operation, chosen["jitter"] & (order[:, place] == number), factors)
                for number, (operation, factors) in enumerate(self._jitters(numbers))
            ]
        steps += [
            (lambda images, _: grey(images).expand_as(images), chosen["grey"], numbers[0]),
            (lambda images, sigma: gaussian_blur(images, sigma, taps=self.taps), chosen["blur"], sigma),
            (lambda images, _: solarize(images, self.threshold), chosen["solarize"], numbers[0]),
        ]
        return [(step, rows.nonzero()[:, 0], values[rows]) for step, rows, values in steps if rows.any()]

    def _jitters(self, numbers: Tensor) -> list[tuple[Callable[..., Tensor], Tensor]]:
        """Return each way of jittering, and its factor or turn for every image."""
        *factors, hue = ((2 * drawn - 1) * strength for drawn, strength in zip(numbers, self.strengths, strict=False))
        brightness, contrast, saturation = ((1 + factor).clamp(min=0) for factor in factors)
        return [
            (adjust_brightness, brightness),
            (adjust_contrast, contrast),
            (adjust_saturation, saturation),
            (adjust_hue, hue),
        ]


def _flipped(images: Tensor, _: Any) -> Tensor:
    return images.flip(3)


def _each(numbers: Tensor) -> Tensor:
    return numbers.view(-1, 1, 1, 1)


def _blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    return (_each(factor) * images + (1 - _each(factor)) * others).clamp(0, 1)
