"""Bytes to pixels."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
"""Endings of the files taken for images, lower case."""


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    """Return the picture as RGB, shape ``(H, W, 3)``, values 0..255, upright by its EXIF orientation.

    PIL's arrays are read-only, so no transform can change what the other view is drawn from.

    Raises:
        OSError: if the bytes are not a whole image.
        ValueError: likewise, from some of PIL's readers.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # PIL clips 16 bits to 255; scale them
        deep = np.asarray(upright, dtype=np.float64)
        upright = Image.fromarray((deep / 257).round().clip(0, 255).astype(np.uint8))
    if upright.mode == "P" and "transparency" in upright.info:  # PIL warns unless it goes by way of RGBA
        upright = upright.convert("RGBA")
    return np.asarray(upright.convert("RGB"))


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Return the picture in a file, as `decode` does.

    Raises:
        RuntimeError: if the file cannot be read or decoded any more; it could when training began.
    """
    try:
        return decode(path.read_bytes())
    except (OSError, ValueError, SyntaxError) as error:
        raise RuntimeError(f"image was readable at the start and is not any more: {path}: {error}") from error
