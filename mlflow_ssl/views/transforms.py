"""The operations as albumentations transforms: they stand in any list of its own, and draw from its generators."""

from collections.abc import Callable, Sequence
from typing import Any

import albumentations
import cv2
import numpy as np
import numpy.typing as npt
from albumentations.core.transforms_interface import ImageOnlyTransform

from mlflow_ssl.views import operations


class RandomResizedCrop(albumentations.RandomResizedCrop):  # type: ignore[misc]
    """albumentations' crop, resized by `mlflow_ssl.views.operations.resize`, which averages where it shrinks much.

    Args:
        size: height and width, pixels.
        scale: bounds of the share of the image's area.
        ratio: bounds of width by height.
        p: probability.
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        p: float = 1.0,
    ) -> None:
        super().__init__(size=tuple(size), scale=tuple(scale), ratio=tuple(ratio), p=p)

    def apply(
        self, img: npt.NDArray[np.uint8], *, crop_coords: tuple[int, int, int, int], **_: Any
    ) -> npt.NDArray[np.uint8]:
        """Return the part ``(H, W, 3)`` of the image that was drawn, resized."""
        left, top, right, bottom = crop_coords
        return operations.resize(img[top:bottom, left:right], *self.size)

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        """Return what a serialized transform is made of."""
        return ("size", "scale", "ratio")


class FlipAndJitter(ImageOnlyTransform):  # type: ignore[misc]
    """Flip, jitter the colours in random order, and turn grey, each with a probability of its own.

    One transform instead of three, as albumentations spends as long on calling one as OpenCV on computing it.

    Args:
        flip: probability of a horizontal flip.
        jitter: probability that the colours are jittered, by all four of these.
        brightness: the factor is drawn from [1 - brightness, 1 + brightness].
        contrast: likewise.
        saturation: likewise.
        hue: the turn is drawn from [-hue, hue], as a share of the circle.
        grey: probability that only the luminance is left.
        p: probability of all of this.

    References:
        Grill et al. 2020, arXiv:2006.07733, app. B, table 6.
    """

    def __init__(
        self,
        *,
        flip: float = 0.5,
        jitter: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        grey: float = 0.2,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.flip = _probability("flip", flip)
        self.jitter = _probability("jitter", jitter)
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        self.grey = _probability("grey", grey)

    def get_params(self) -> dict[str, Any]:
        """Draw what is done: a list of operations and numbers."""
        draw = self.py_random
        params: dict[str, Any] = {"flip": draw.random() < self.flip, "steps": []}
        if draw.random() < self.jitter:
            params["steps"] = [
                (operations.adjust_brightness, draw.uniform(max(1 - self.brightness, 0), 1 + self.brightness)),
                (operations.adjust_contrast, draw.uniform(max(1 - self.contrast, 0), 1 + self.contrast)),
                (operations.adjust_saturation, draw.uniform(max(1 - self.saturation, 0), 1 + self.saturation)),
                (operations.adjust_hue, draw.uniform(-self.hue, self.hue)),
            ]
            draw.shuffle(params["steps"])
        params["grey"] = draw.random() < self.grey
        return params

    def apply(
        self,
        img: npt.NDArray[np.uint8],
        *,
        flip: bool,
        steps: Sequence[tuple[Callable[[Any, float], Any], float]],
        grey: bool,
        **_: Any,
    ) -> npt.NDArray[np.uint8]:
        """Return the image ``(H, W, 3)`` after what was drawn."""
        if flip:
            img = cv2.flip(img, 1)  # type: ignore[assignment]
        for operation, number in steps:
            img = operation(img, number)
        return operations.to_grey(img) if grey else img

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        """Return what a serialized transform is made of."""
        return ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "grey")


class GaussianBlur(ImageOnlyTransform):  # type: ignore[misc]
    """Blur with a Gaussian whose width is drawn evenly; see `mlflow_ssl.views.operations.gaussian_blur`.

    Args:
        sigma: bounds of the standard deviation, pixels.
        most_taps: values of the kernel, at most.
        p: probability.
    """

    def __init__(
        self, *, sigma: Sequence[float] = (0.1, 2.0), most_taps: int = operations.MOST_TAPS, p: float = 0.5
    ) -> None:
        super().__init__(p=p)
        self.sigma = tuple(sigma)
        self.most_taps = most_taps
        if len(self.sigma) != 2 or not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma must be two numbers above 0, the lower first, got {list(sigma)}")
        if most_taps < 1 or most_taps % 2 == 0:
            raise ValueError(f"most_taps must be odd and positive, got {most_taps}")

    def get_params(self) -> dict[str, Any]:
        """Draw the width."""
        return {"width": self.py_random.uniform(*self.sigma)}

    def apply(self, img: npt.NDArray[np.uint8], *, width: float, **_: Any) -> npt.NDArray[np.uint8]:
        """Return the blurred image ``(H, W, 3)``."""
        return operations.gaussian_blur(img, width, most_taps=self.most_taps)

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        """Return what a serialized transform is made of."""
        return ("sigma", "most_taps")


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability, got {value}")
    return value
