"""Images per CPU-second: decode a 256 px JPEG and draw two BYOL views of it, on one core.

``python benchmarks/views.py [ROUNDS]`` compares, in one run and in turns,

- lightly's ``BYOLTransform`` (in an environment of its own, which is made on first use with ``uv``);
- albumentations' plain recipe, as one would write it without this package;
- this package's ``transforms=byol``;
- decoding and the two crops alone: what no recipe can beat.

Every candidate decodes with Pillow and ends with what a loader hands on: two normalized float32 tensors. It prints the
median of the rounds, their spread, and the ratio to lightly round by round. CPU time is counted, not wall time.
"""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peer_environments import LIGHTLY, peer_python

SECONDS = 2.0
SIZES = (224, 64)

PEER = """
import io, sys, time
import torch
from PIL import Image
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
torch.set_num_threads(1)
files = [open(path, "rb").read() for path in sys.argv[3:]]
seconds, size = float(sys.argv[1]), int(sys.argv[2])
transform = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
print("ready", flush=True)
for _ in sys.stdin:
    began, count = time.process_time(), 0
    while time.process_time() - began < seconds:
        with Image.open(io.BytesIO(files[count % len(files)])) as image:
            transform(image.convert("RGB"))
        count += 1
    print(count / (time.process_time() - began), flush=True)
"""


def write_images(folder: Path, count: int = 16, *, seed: int = 0) -> list[Path]:
    """Write JPEG files of 256 px with structure at all scales, as photographs have."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        pixels = np.zeros((256, 256, 3))
        for side in (4, 16, 64, 256):
            noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            pixels += np.asarray(noise.resize((256, 256), Image.Resampling.BICUBIC)) * (4 / side) ** 0.5
        pixels = 255 * (pixels - pixels.min()) / np.ptp(pixels)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def start_peer(size: int, paths: list[Path]) -> tuple[subprocess.Popen[str], Callable[[], float]]:
    """Start lightly; return its process, and a function that has it run for one round."""
    command = [peer_python(LIGHTLY), "-W", "ignore", "-c", PEER, str(SECONDS), str(size), *map(str, paths)]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    told, said = peer.stdin, peer.stdout
    assert told is not None
    assert said is not None
    assert said.readline() == "ready\n"

    def one_round() -> float:
        told.write("go\n")
        told.flush()
        return float(said.readline())

    return peer, one_round


def plain_recipe(size: int) -> list[Any]:
    """Return the two views in albumentations' own words."""
    import albumentations as A

    def view(blur: float, solarize: float) -> Any:
        return A.Compose(
            [
                A.RandomResizedCrop(size=(size, size), scale=(0.08, 1.0), interpolation=2),
                A.HorizontalFlip(p=0.5),
                A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
                A.ToGray(p=0.2),
                A.GaussianBlur(blur_limit=23, sigma_limit=(0.1, 2), p=blur),
                A.Solarize(p=solarize),
                A.Normalize(),
            ]
        )

    return [view(1.0, 0.0), view(0.1, 0.2)]


def crops_alone(size: int) -> list[Any]:
    """Return crops and nothing else."""
    import albumentations as A

    return [A.RandomResizedCrop(size=(size, size), scale=(0.08, 1.0), interpolation=2)] * 2


def our_recipe(size: int) -> list[Any]:
    """Return the views of ``transforms=byol``."""
    from mlflow_ssl.config import build, compose_config

    sizes = [f"transforms.input_{side}={size}" for side in ("height", "width")]
    transforms = compose_config(["experiment=base/ssl/byol", "data_path=x", *sizes]).transforms
    return [build(transforms.augmentation1), build(transforms.augmentation2)]


def rate(transforms: list[Any], files: list[bytes], finish: Callable[[Any], Any]) -> float:
    """Return images per CPU-second."""
    from mlflow_ssl.datasets.decode import decode
    from mlflow_ssl.transforms import apply

    began, count = time.process_time(), 0
    while time.process_time() - began < SECONDS:
        image = decode(files[count % len(files)])
        for view, transform in enumerate(transforms, start=1):
            finish(apply(transform, image, draw=(0, 0, count, view)))
        count += 1
    return count / (time.process_time() - began)


def compare(size: int, rounds: int, paths: list[Path]) -> None:
    """Print the table of one size."""
    import torch

    from mlflow_ssl.transforms import to_tensor
    from mlflow_ssl.views import Normalize

    normalize = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    def normalized(view: Any) -> Any:  # as the training device does with a batch
        return normalize(torch.from_numpy(view).permute(2, 0, 1)[None])

    files = [path.read_bytes() for path in paths]
    recipes: dict[str, tuple[list[Any], Callable[[Any], Any]]] = {
        "albumentations, plain recipe": (plain_recipe(size), to_tensor),
        "mlflow_ssl, transforms=byol": (our_recipe(size), normalized),
        "decode and two crops alone": (crops_alone(size), lambda view: view),
    }
    peer, lightly = start_peer(size, paths)
    rates: dict[str, list[float]] = {"lightly BYOLTransform": [], **{name: [] for name in recipes}}
    for number in range(rounds + 1):
        measured = {"lightly BYOLTransform": lightly()}
        measured |= {name: rate(transforms, files, finish) for name, (transforms, finish) in recipes.items()}
        if number:  # the first round warms up
            for name, value in measured.items():
                rates[name].append(value)
    peer.kill()
    print(f"\n| {size} px | images per CPU-second | least to most | ratio to lightly | least to most |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, rates["lightly BYOLTransform"], strict=True)]
        print(
            f"| {name} | {statistics.median(values):.0f} | {min(values):.0f} to {max(values):.0f} | "
            f"{statistics.median(ratios):.1f} | {min(ratios):.1f} to {max(ratios):.1f} |",
            flush=True,
        )


def main() -> None:
    """Print both tables."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    print(f"Python {platform.python_version()}, torch {torch.__version__}, OpenCV {cv2.__version__}, {LIGHTLY.name}")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder))
        for size in SIZES:
            compare(size, rounds, paths)


if __name__ == "__main__":
    main()
