"""Views finished in batches, on the device that the network is trained on.

The loader's workers only decode and crop. Pure functions of images ``(B, 3, H, W)``, values in [0, 1], and one number
an image; and `DeviceViews`, which draws the numbers. They are torchvision's operations, which know one number a batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = (0.2989, 0.587, 0.114)
"""Luminance of red, green and blue: ITU-R BT.601, as torchvision has it."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The ways of jittering, by the place of their numbers."""


def to_grey(images: Tensor) -> Tensor:
    """Return the luminance ``(B, 1, H, W)``."""
    red, green, blue = torch.split(images, 1, dim=1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def adjust(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Return each image blended with what its operation blends it with: ``factor * image + (1 - factor) * other``.

    That is black for brightness, the mean luminance for contrast and the luminance for saturation; the blend is clamped
    to [0, 1]. One operation for all three, so that images in which they come in another order share a batch.

    Args:
        images: shape ``(B, 3, H, W)``.
        operation: `BRIGHTNESS`, `CONTRAST` or `SATURATION` of each image, shape ``(B,)``.
        factor: 0 or more, shape ``(B,)``.
    """
    luminance = to_grey(images)
    mean = luminance.mean((1, 2, 3)) * (operation == CONTRAST)
    other = luminance.mul_(_each(operation == SATURATION)).add_(_each(mean))
    return torch.lerp(other, images, _each(factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Return each image with its hue turned by a share of the circle, shape ``(B,)``.

    The least channel and the chroma stay; of a hue ``h``, in sixths of the circle, red has as its share of the
    chroma ``|h - 3| - 1``, green ``2 - |h - 2|`` and blue ``2 - |h - 4|``, each clamped to [0, 1].

    References:
        Smith 1978, Color Gamut Transform Pairs, doi:10.1145/965139.807361.
    """
    red, green, blue = torch.split(images, 1, dim=1)
    largest, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = largest - least
    hue = torch.where(
        largest == red,
        green - blue,
        torch.where(largest == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)),
    )
    hue = hue.div_(chroma.clamp(min=1e-12)).add_(_each(6 * turn))  # grey: 0 of any hue
    hue = hue.sub_((hue / 6).floor_(), alpha=6)  # [0, 6)
    turned = torch.empty_like(images)
    torch.sub((hue - 3).abs_(), 1, out=turned[:, :1])
    torch.sub(2, (hue - 2).abs_(), out=turned[:, 1:2])
    torch.sub(2, (hue - 4).abs_(), out=turned[:, 2:])
    return turned.clamp_(0, 1).mul_(chroma).add_(least)


def gaussian_blur(images: Tensor, sigma: Tensor, *, taps: int) -> Tensor:
    """Return each image convolved with a Gaussian of its own standard deviation, in pixels, reflected at the borders.

    Args:
        images: shape ``(B, 3, H, W)``, sides longer than half of ``taps``.
        sigma: above 0, shape ``(B,)``.
        taps: values of the kernel, odd.
    """
    count, channels, height, width = images.shape
    half = taps // 2
    places = torch.arange(-half, half + 1, device=images.device)
    kernels = torch.exp(-0.5 * (places / sigma[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (3 B, taps)
    planes = F.pad(images, (half, half, half, half), mode="reflect").view(1, count * channels, -1, width + 2 * half)
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=count * channels)
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=count * channels)
    return planes.view(count, channels, height, width)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Return the images with all values from ``threshold`` on inverted."""
    return torch.where(images >= threshold, 1 - images, images)


@dataclass(frozen=True)
class Drawn:
    """What is done to each of ``B`` images, on the host.

    Attributes:
        flip: whether, shape ``(B,)``.
        jitter: whether.
        numbers: three factors, and the turn of the hue, shape ``(B, 4)``.
        order: the operations in turn, shape ``(B, 4)``.
        grey: whether.
        blur: whether.
        sigma: standard deviation, pixels.
        solarize: whether.
    """

    flip: Tensor
    jitter: Tensor
    numbers: Tensor
    order: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor

    def __getitem__(self, rows: Tensor) -> "Drawn":
        """Return what is done to some of the images."""
        return Drawn(**{name: drawn[rows] for name, drawn in vars(self).items()})


class DeviceViews:
    """Finish one view of each image of a batch: flip, jitter, grey, blur, solarize, normalize.

    All random numbers are drawn on the host and sent in one small tensor: nothing waits for the device, and a view
    depends on the generator alone, whatever the device.

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

    Raises:
        ValueError: if a number is out of its bounds.

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
        threshold: float = 0.5,
    ) -> None:
        self.probabilities = {"flip": flip, "jitter": jitter, "grey": grey, "blur": blur, "solarize": solarize}
        for name, value in self.probabilities.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability, got {value}")
        if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1]:
            raise ValueError(f"sigma must be two numbers above 0, the lower first, got {list(sigma)}")
        if most_taps < 1 or most_taps % 2 == 0:
            raise ValueError(f"most_taps must be odd and positive, got {most_taps}")
        self.mean, self.std = tuple(mean), tuple(std)
        self.strengths = (brightness, contrast, saturation, hue)
        self.sigma = (float(sigma[0]), float(sigma[1]))
        self.taps = min(2 * math.ceil(3 * self.sigma[1]) + 1, most_taps)
        self.threshold = threshold

    def __call__(self, images: Tensor, generator: torch.Generator, *, share: tuple[int, int] = (0, 1)) -> Tensor:
        """Return the views, normalized, float32 of shape ``(B, 3, H, W)``.

        Args:
            images: bytes 0..255 or numbers in [0, 1], shape ``(B, 3, H, W)``.
            generator: on the host.
            share: see `draw`.
        """
        return self.finish(images, self.draw(len(images), generator, share=share))

    def draw(self, count: int, generator: torch.Generator, *, share: tuple[int, int] = (0, 1)) -> Drawn:
        """Return what is to be done to ``count`` images; the first of them are drawn alike for any count.

        Args:
            count: of the images.
            generator: on the host.
            share: which images of a batch of ``count * world_size`` they are: the number of the first, and
                ``world_size``, the step to the next, as the sampler deals images to processes. Together the processes
                draw what one would draw for the whole batch.
        """
        first, world_size = share
        drawn = torch.rand(count * world_size, 14, generator=generator)[first::world_size]
        chance, numbers, order = torch.split(drawn, [5, 5, 4], dim=1)
        chosen = {name: chance[:, place] < share for place, (name, share) in enumerate(self.probabilities.items())}
        strengths = torch.tensor(self.strengths)
        centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
        drawn = centre + (2 * numbers[:, :4] - 1) * strengths
        drawn[:, :HUE].clamp_(min=0)
        low, high = self.sigma
        return Drawn(**chosen, numbers=drawn, order=order.argsort(1), sigma=low + (high - low) * numbers[:, 4])

    def finish(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Return the views ``(B, 3, H, W)``, normalized, after what was drawn for each image."""
        hue_place = torch.where(drawn.jitter, (drawn.order == HUE).int().argmax(1), -1)
        sorting = hue_place.argsort(descending=True, stable=True)  # as `_jitter` needs them
        drawn = drawn[sorting]
        blends = drawn.order[drawn.order != HUE].view(-1, 3)
        steps = {name: getattr(drawn, name).nonzero()[:, 0] for name in ("flip", "grey", "blur", "solarize")}
        sent = _send(
            {"sorting": sorting, "blends": blends, "factors": drawn.numbers.gather(1, blends)}
            | {"turns": drawn.numbers[:, HUE], "sigma": drawn.sigma[steps["blur"]]}
            | steps,
            images.device,
        )
        before_hue = [int((hue_place > place).sum()) for place in range(3)]
        with torch.autocast(images.device.type, enabled=False):
            images = images[sent["sorting"]].contiguous()
            images = _put(images, sent["flip"], lambda some: some.flip(3))
            images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
            _jitter(images[: int(drawn.jitter.sum())], sent, before_hue)
            images = _put(images, sent["grey"], lambda some: to_grey(some).repeat(1, 3, 1, 1))
            taps = min(self.taps, 2 * min(images.shape[2:]) - 1)  # a border is no wider than what it reflects
            images = _put(images, sent["blur"], lambda some: gaussian_blur(some, sent["sigma"], taps=taps))
            images = _put(images, sent["solarize"], lambda some: solarize(some, self.threshold))
            for channel, mean, std in zip(images.unbind(1), self.mean, self.std, strict=True):
                channel.sub_(mean).div_(std)
            return torch.empty_like(images).index_copy_(0, sent["sorting"], images)


def _jitter(images: Tensor, sent: Mapping[str, Tensor], before_hue: Sequence[int]) -> None:
    """Jitter the colours of images in place, each in its own order.

    They are sorted by how many of the three blends come before the hue is turned, most first: ``before_hue`` counts
    those where more than 0, 1 and 2 do. So each step is done to a slice.
    """
    count = len(images)

    def blend(place: int, some: slice) -> None:
        if len(images[some]):
            images[some] = adjust(images[some], sent["blends"][some, place], sent["factors"][some, place])

    for place, stop in enumerate(before_hue):
        blend(place, slice(0, stop))
    if count:
        images.copy_(adjust_hue(images, sent["turns"][:count]))
    for place, start in enumerate(before_hue):
        blend(place, slice(start, count))


def _put(images: Tensor, rows: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the images after an operation on some rows; they are overwritten."""
    if len(rows) == len(images):
        return operation(images)
    return images.index_copy_(0, rows, operation(images[rows])) if len(rows) else images


def _send(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors of the host on the device, sent as one; integers are below 2 to the 24."""
    packed = torch.cat([tensor.flatten().float() for tensor in tensors.values()])
    if device.type == "cuda":
        packed = packed.pin_memory()  # what is not waits for what the device is doing
    parts = torch.split(packed.to(device, non_blocking=True), [tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def _each(numbers: Tensor) -> Tensor:
    return numbers.view(-1, 1, 1, 1)
