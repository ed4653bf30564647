"""Bytes to pixels: every format and mode that people have, upright, as 8-bit RGB; or one line on why not.

The module imports nothing of ours, as a copy of it goes with every registered model.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
"""Endings of the files taken for images, lower case."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
"""What a file may be, whatever its ending says. Pillow's other readers stay shut: one of them runs programs."""

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded: Pillow's limit, a quarter of a GiB at 3 bytes a pixel."""

_ORIENTATION = 0x0112  # in EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)

# `max_pixels` judges the size, and what matters of the rest becomes a reason
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")


class DecodeError(ValueError):
    """The bytes are no image that can be read; the message says in one line why."""


def decode(data: bytes, *, at_least: int | None = None, max_pixels: int | None = None) -> npt.NDArray[np.uint8]:
    """Return the picture as RGB, shape ``(H, W, 3)``, values 0..255, upright by its EXIF orientation.

    Of several frames or pages it is the first; transparency is dropped, and what lies behind it shows. 16 bits are
    divided by 257. Floating-point values are taken as fractions where all are in [0, 1], as bytes in [0, 255], as 16
    bits in [0, 65535], and stretched from the least to the largest elsewhere, as are integers beyond 16 bits.

    The array is read-only, so no transform can change what the other view is drawn from.

    Args:
        data: a JPEG, PNG, WebP, TIFF, BMP, GIF, PPM or PGM file.
        at_least: pixels of the shorter side that are enough. A larger JPEG is decoded at a half, a quarter or an eighth
            of its size, the smallest whose shorter side is not below this; libjpeg leaves out the fine detail that
            shrinking would average away.
        max_pixels: of an image that is decoded; by default `MAX_PIXELS`, and never more than twice that, where Pillow
            refuses.

    Raises:
        DecodeError: if the bytes are not a whole image, or one with too many pixels.
    """
    with _refusing(), _opened(data, max_pixels) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # JPEG alone can
        return _pixels(image)


def measure(data: bytes, *, max_pixels: int | None = None) -> tuple[int, int]:
    """Return width and height in pixels, upright, of a file that `decode` would take.

    All of it is read to its end; a JPEG's pixels are computed at an eighth of the size only.

    Args:
        data: as for `decode`.
        max_pixels: likewise.

    Raises:
        DecodeError: where `decode` would.
    """
    with _refusing(), _opened(data, max_pixels) as image:
        if image.format != "JPEG":
            height, width, _ = _pixels(image).shape
            return width, height
        width, height = image.size
        lying = _orientation(image) in _LYING
        image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
        _pixels(image)
    return (height, width) if lying else (width, height)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise anything for broken or hostile bytes
        raise DecodeError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is no image of a format that is read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"has more than {MAX_PIXELS:,} pixels"
    words = " ".join(str(error).split()) or type(error).__name__
    return "is truncated" if "truncated" in words.lower() else f"is broken: {words}"


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int | None) -> Iterator[Image.Image]:
    if not data:
        raise DecodeError("is empty")
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > limit:
            raise DecodeError(f"has {image.width * image.height:,} pixels, at most {limit:,} are decoded")
        yield image


def _orientation(image: Image.Image) -> int:
    """Return the orientation of a JPEG, or of an image that is loaded: others would be loaded here, and damage lost."""
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return 1  # a tenth of the time that a small file takes
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken note about a picture is no broken picture
        return 1


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode == "F" or upright.mode.startswith("I"):  # Pillow clips them to 255
        upright = Image.fromarray(_scaled(np.asarray(upright)))
    if upright.mode == "P" and "transparency" in upright.info:  # Pillow warns unless it goes by way of RGBA
        upright = upright.convert("RGBA")
    pixels = np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    pixels.flags.writeable = False
    return pixels


def _scaled(deep: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return values of more than 8 bits as bytes, by the rule of `decode`."""
    if deep.dtype.kind == "f":
        deep = np.nan_to_num(deep.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(deep.min()), float(deep.max())
    if deep.dtype.kind != "f" and low >= 0 and high <= 65535:
        scaled: Any = (deep.astype(np.uint32) + 128) // 257
    elif low >= 0 and high <= 65535:
        full = next(full for full in (1, 255, 65535) if high <= full)
        scaled = (deep * (255 / full)).round()
    else:
        scaled = ((deep.astype(np.float64) - low) * (255 / (high - low))).round()
    pixels: npt.NDArray[np.uint8] = scaled.astype(np.uint8)
    return pixels
