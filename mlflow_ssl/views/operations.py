"""What is done to the pixels of a view: pure functions of an image ``(H, W, 3)`` of uint8 and one number.

Each is torchvision's operation of that name, from which it differs by the rounding of a grey level, as the tests show;
each runs in OpenCV's vectorized loops, where 224 px take some 20 to 150 µs.
"""

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

MOST_TAPS = 23
"""Of a blur at 224 px: Grill et al. 2020, arXiv:2006.07733, app. B."""


GREY = np.array([0.299, 0.587, 0.114])
"""Luminance of red, green and blue: ITU-R BT.601."""

_IDENTITY = np.eye(3)


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Return the image in another size, by cubic interpolation.

    Where it shrinks to a half or less, blocks of 2x2, 3x3, ... pixels are averaged first, or fine texture would alias.
    Of what such blocks do not fill, at the right and the bottom, up to a block's width is lost.
    """
    factor = min(image.shape[0] // height, image.shape[1] // width)
    if factor > 1:
        high, wide = image.shape[0] // factor, image.shape[1] // factor
        image = _pixels(cv2.resize(image[: high * factor, : wide * factor], (wide, high), interpolation=cv2.INTER_AREA))
    return _pixels(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC))


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Return ``factor * image``, clamped to 0..255; ``factor`` is 0 or more."""
    return _pixels(cv2.convertScaleAbs(image, alpha=factor))


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Return the image blended with its mean grey: ``factor * image + (1 - factor) * mean``, clamped to 0..255."""
    mean = float(GREY @ cv2.mean(image)[:3])
    return _pixels(cv2.addWeighted(image, factor, image, 0.0, (1 - factor) * mean))


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    """Return the image blended with its grey version: ``factor * image + (1 - factor) * grey``, clamped to 0..255."""
    return _pixels(cv2.transform(image, factor * _IDENTITY + (1 - factor) * GREY))


def adjust_hue(image: Pixels, turn: float) -> Pixels:
    """Return the image with its hue turned by a share of the circle, in [-0.5, 0.5]."""
    colours = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)  # hue in degrees
    degrees: Any = (turn * 360 % 360, 0, 0, 0)
    cv2.add(colours, degrees, dst=colours)  # OpenCV takes what is above 360 as what it means
    return _pixels(cv2.convertScaleAbs(cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)))


def to_grey(image: Pixels) -> Pixels:
    """Return the luminance, ITU-R BT.601, in three equal channels."""
    return _pixels(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def gaussian_blur(image: Pixels, sigma: float, *, most_taps: int = MOST_TAPS) -> Pixels:
    """Return the image convolved with a Gaussian of standard deviation ``sigma`` pixels, reflected at the borders.

    The kernel ends at three standard deviations, 0.3 % of its mass, but never has more than ``most_taps`` values.
    """
    taps = min(2 * math.ceil(3 * sigma) + 1, most_taps)
    kernel = cv2.getGaussianKernel(taps, sigma, cv2.CV_32F)
    return _pixels(cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101))


def solarize(image: Pixels, threshold: int = 128) -> Pixels:
    """Return the image with all values from ``threshold`` on inverted."""
    values = np.arange(256, dtype=np.uint8)
    return _pixels(cv2.LUT(image, np.where(values >= threshold, 255 - values, values)))


def _pixels(array: Any) -> Pixels:
    pixels: Pixels = array
    return pixels
