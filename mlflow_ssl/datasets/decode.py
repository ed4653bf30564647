"""Bytes to pixels: every format and mode that people have, upright, as 8-bit RGB; or one line on why not.

The module imports nothing of ours, as a copy of it goes with every registered model.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
"""Endings of the files taken for images, lower case."""

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded: Pillow's limit, a quarter of a GiB at 3 bytes a pixel."""

# How a file begins says what it is, whatever its ending says. Not `Image.open`: it warns of large images where we have
# a limit, takes a broken TIFF for no image, and knows formats that run programs.
_READERS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (rb"\xff\xd8\xff", JpegImageFile),
    (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    (rb"RIFF....WEBP", WebPImageFile),
    (rb"(II|MM)(\*\0|\0\*|\+\0|\0\+)", TiffImageFile),
    (rb"BM", BmpImageFile),
    (rb"GIF8[79]a", GifImageFile),
    (rb"P[1-6f]\s", PpmImageFile),
)

# in Pillow's words
_TRUNCATED = ("truncated", "not enough image data", "requires a buffer of", "reached eof")
_TRUNCATED_OR_BROKEN = (
    "not identified by this driver",
    "cannot load this image",
    "missing dimensions",
    "no more images in gif",
    "could not create decoder",
    "failed to read next frame",
)

_HUSHED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as `warnings` keeps it

_ORIENTATION = 0x0112  # in EXIF
_NOTES = {"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"}
"""Where Pillow looks for the orientation. To look costs a tenth of the time that a small file takes."""

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


class DecodeError(ValueError):
    """The bytes are no image that can be read; the message says in one line why."""


def decode(data: bytes, *, at_least: int | None = None, max_pixels: int | None = None) -> npt.NDArray[np.uint8]:
    """Return the picture as RGB, shape ``(H, W, 3)``, values 0..255, upright by its EXIF orientation.

    Of several frames or pages it is the first; transparency is dropped, and what lies behind it shows. What has
    more than 8 bits is divided so that its white becomes 255; floating-point values are fractions where all of them are
    in [0, 1], and stretched from the least to the largest elsewhere, as are integers below 0 or beyond 16 bits.

    The array is read-only, so no transform can change what the other view is drawn from.

    Args:
        data: a JPEG, PNG, WebP, TIFF, BMP, GIF, PPM or PGM file.
        at_least: pixels of the shorter side that are enough. A larger JPEG is decoded at a half, a quarter or an eighth
            of its size, the smallest whose shorter side is not below this; libjpeg leaves out the fine detail that
            shrinking would average away.
        max_pixels: of an image that is decoded; by default `MAX_PIXELS`. A larger one raises Pillow's own limit,
            `PIL.Image.MAX_IMAGE_PIXELS`, as well.

    Raises:
        DecodeError: if the bytes are not a whole image, or one with too many pixels.
        ValueError: if ``at_least`` is below 1.
    """
    if at_least is not None and at_least < 1:
        raise ValueError(f"at_least must be at least 1, got {at_least}")
    with _opened(data, max_pixels) as image:
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
    with _opened(data, max_pixels) as image:
        if not isinstance(image, JpegImageFile):
            height, width, _ = _pixels(image).shape
            return width, height
        width, height = image.size
        lying = _orientation(image) in _LYING
        image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
        _pixels(image)
    return (height, width) if lying else (width, height)


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int | None) -> Iterator[ImageFile]:
    """Give the image, its pixels not read yet; whatever is wrong with it, here or in reading, is a `DecodeError`."""
    _hush()
    limit = _limit(max_pixels)
    try:
        with _reader(data)(io.BytesIO(data)) as image:
            _check(image, data, limit)
            yield image
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise anything for broken or hostile bytes
        raise DecodeError(_reason(error)) from error


def _check(image: ImageFile, data: bytes, limit: int) -> None:
    num_pixels = image.width * image.height
    if num_pixels > limit:
        raise DecodeError(f"has {num_pixels:,} pixels, at most {limit:,} are decoded")
    if isinstance(image, PngImageFile):  # checksums that Pillow passes over when it decodes, and the end
        PngImageFile(io.BytesIO(data)).verify()


def _reader(data: bytes) -> type[ImageFile]:
    if not data:
        raise DecodeError("is empty")
    for beginning, reader in _READERS:
        if re.match(beginning, data, re.DOTALL):
            return reader
    raise DecodeError("is no image of a format that is read")


def _limit(max_pixels: int | None) -> int:
    if max_pixels is None:
        return MAX_PIXELS
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # the readers of TIFF, GIF and WebP refuse at twice this
    return max_pixels


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    words = " ".join(str(error).split()) or type(error).__name__
    if any(sign in words.lower() for sign in _TRUNCATED):
        return "is truncated"
    if any(sign in words.lower() for sign in _TRUNCATED_OR_BROKEN):
        return "is truncated or broken"
    return f"cannot be decoded: {words}"


def _hush() -> None:
    """Keep Pillow's remarks on odd files from being shown, or raised where warnings are errors.

    For good, and again where others have set filters since: `warnings.catch_warnings` changes those of all threads.
    """
    if warnings.filters[:1] != [_HUSHED]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _orientation(image: ImageFile) -> int:
    """Return the orientation of a JPEG, or of an image that is loaded: others would be loaded here, and damage lost."""
    if not _NOTES & image.info.keys():
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken note about a picture is no broken picture
        return 1


def _pixels(image: ImageFile) -> npt.NDArray[np.uint8]:
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode == "F" or upright.mode.startswith("I"):  # Pillow clips them to 255
        upright = Image.fromarray(_scaled(np.asarray(upright), _largest(image)))
    if upright.mode == "P" and "transparency" in upright.info:  # Pillow warns unless it goes by way of RGBA
        upright = upright.convert("RGBA")
    pixels = np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    pixels.flags.writeable = False
    return pixels


def _largest(image: ImageFile) -> int:
    """Return what stands for white in an image of integers."""
    bits = image.tag_v2.get(BITSPERSAMPLE) if isinstance(image, TiffImageFile) else None
    return 4095 if bits == (12,) else 65535


def _scaled(deep: npt.NDArray[Any], largest: int) -> npt.NDArray[np.uint8]:
    """Return values of more than 8 bits as bytes, by the rule of `decode`."""
    if deep.dtype.kind == "f":
        deep, largest = np.nan_to_num(deep, posinf=0.0, neginf=0.0), 1
    low, high = float(deep.min()), float(deep.max())
    if low >= 0 and high <= largest:
        scaled = deep * (255 / largest)
    else:
        scaled = (deep.astype(np.float64) - low) * (255 / (high - low or 1))
    pixels: npt.NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
    return pixels
