"""Microseconds of processor time to get an image's pixels, from its file and from the cache, one thread.

``python benchmarks/cache.py [ROUNDS]`` has JPEG files of two sizes read through a data set of this package: decoded
each time; decoded and written to the cache; read from the cache by a process that has not seen them, which checks their
sums; and read again. It prints the medians of the rounds, and their ratios to decoding, for both kinds of cache.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COUNT = 400
SIZES = ((256, 256), (1024, 768))
SHORTER_SIDE = 256
STEPS = ("decode", "decode and write", "first read", "later read")


def write_images(folder: Path, width: int, height: int) -> None:
    """Write JPEG files with structure at several scales, in two class folders."""
    for number in range(COUNT):
        rng = np.random.default_rng(number)
        pixels = np.zeros((height, width, 3))
        for scale in (4, 32, 128):
            noise = Image.fromarray(rng.integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8))
            pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) * scale**0.5
        path = folder / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels / pixels.max()).astype(np.uint8)).save(path, quality=90)


def opened(folder: Path, kind: str) -> Any:
    """Return the images as a training reads them."""
    from mlflow_ssl.datamodules import ClassificationDataModule

    datamodule = ClassificationDataModule(
        str(folder), cache=kind, cache_shorter_side=SHORTER_SIDE, num_workers=0, val_size=0.0, test_size=0.0
    )
    datamodule.setup()
    return datamodule._datasets["train"]


def microseconds(images: Any) -> float:
    """Return the processor time to get an image, all of them once."""
    total = 0.0
    for row in range(len(images)):
        began = time.process_time()
        pixels = images.picture(row)
        pixels.sum()  # what is never looked at is never read
        got = time.process_time()
        pixels.sum()
        total += (got - began) - (time.process_time() - got)
    return 1e6 * total / len(images)


def in_new_process(folder: Path, kind: str) -> list[float]:
    """Return what a first and a later read cost a process that did not write the cache."""
    command = [sys.executable, __file__, "read", str(folder), kind]
    return [float(word) for word in subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()]


def one_round(folder: Path, kind: str) -> list[float]:
    """Return the figures of `STEPS`."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MLFLOW_SSL_CACHE"] = cache
        plain = opened(folder, "none")
        decoding = microseconds(plain)
        filling = opened(folder, kind)  # open until the other process has read: memory is given back by its last user
        writing = microseconds(filling)
        times = [decoding, writing, *in_new_process(folder, kind)]
        filling.cache._cache.close()
    return times


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["read"]:
        images = opened(Path(sys.argv[2]), sys.argv[3])
        sys.stdout.write(f"{microseconds(images)} {microseconds(images)}\n")
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"Python {platform.python_version()}, {COUNT} JPEG files, shorter side {SHORTER_SIDE} px")
    print("\n| microseconds (decoding is so many times as long) |" + "".join(f" {step} |" for step in STEPS))
    print("| --- |" + " --- |" * len(STEPS))
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), width, height)
            for kind in ("ram", "disk"):
                columns = zip(*(one_round(Path(folder), kind) for _ in range(rounds)), strict=True)
                medians = [statistics.median(column) for column in columns]
                cells = "".join(f" {median:.0f} ({medians[0] / median:.1f}) |" for median in medians)
                print(f"| {width}x{height}, {kind} |{cells}", flush=True)


if __name__ == "__main__":
    main()
