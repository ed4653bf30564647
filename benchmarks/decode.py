"""Milliseconds of processor time to decode an image, one thread: Pillow as it comes, this package, and OpenCV.

``python benchmarks/decode.py [ROUNDS]`` decodes, in one run and in turns, a 256 px JPEG, a 12-megapixel JPEG (whole and
at the size that views of 224 px need), a 12-megapixel TIFF, and a PNG and a WebP of one megapixel. It prints the median
of the rounds and the ratio to Pillow. OpenCV takes truncated files without a word, so it is here for comparison only.
"""

import io
import statistics
import sys
import time
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from mlflow_ssl.datasets.decode import decode, measure

SECONDS = 0.5
VIEWS_NEED = 896


def picture(width: int, height: int) -> Image.Image:
    """Return an image with structure at several scales."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3))
    for scale in (4, 32, 256):
        noise = Image.fromarray(
            rng.integers(0, 256, (max(height // scale, 1), max(width // scale, 1), 3), dtype=np.uint8)
        )
        pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) * scale**0.5
    return Image.fromarray((255 * pixels / pixels.max()).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: int) -> bytes:
    """Return an image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_pillow(data: bytes) -> object:
    """Decode as one would without this package."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def with_opencv(data: bytes) -> object:
    """Decode with OpenCV."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def milliseconds(function: Callable[[bytes], object], data: bytes) -> float:
    """Return the processor time of one call."""
    began, count = time.process_time(), 0
    while time.process_time() - began < SECONDS or not count:
        function(data)
        count += 1
    return 1000 * (time.process_time() - began) / count


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    cv2.setNumThreads(1)
    small, middle, large = picture(256, 256), picture(1200, 840), picture(4000, 3000)
    files = {
        "JPEG, 256 px": saved(small, "JPEG", quality=90),
        "JPEG, 12 megapixels": saved(large, "JPEG", quality=90),
        "TIFF, 12 megapixels": saved(large, "TIFF"),
        "PNG, 1 megapixel": saved(middle, "PNG"),
        "WebP, 1 megapixel": saved(middle, "WEBP"),
    }
    candidates: dict[str, Callable[[bytes], object]] = {
        "Pillow": with_pillow,
        "decode": decode,
        f"decode, {VIEWS_NEED} px are enough": lambda data: decode(data, at_least=VIEWS_NEED),
        "measure": measure,
        "OpenCV": with_opencv,
    }
    print(f"| milliseconds (ratio to Pillow) | {' | '.join(candidates)} |")
    print(f"|{' --- |' * (len(candidates) + 1)}")
    for name, data in files.items():
        times = [[milliseconds(function, data) for function in candidates.values()] for _ in range(rounds)]
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        cells = [f"{median:.2f} ({median / medians[0]:.2f})" for median in medians]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
