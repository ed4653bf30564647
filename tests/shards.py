"""WebDataset shards, for tests."""

import io
import tarfile

import numpy as np
from PIL import Image


def png(number, size=8):
    """Return the file of an image that is its number in grey."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 100, (size, size, 3)) + 15 * (number % 10)
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(file, members):
    """Write members, name to bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def write_shards(folder, counts, classes=("cat", "dog")):
    """Write shards ``shard-000.tar``, ... of so many images, numbered through, their classes in turns."""
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            members.append((f"{number:05d}.png", png(number)))
            if classes:
                members.append((f"{number:05d}.cls", classes[number % len(classes)].encode()))
            number += 1
        write_tar(folder / f"shard-{shard:03d}.tar", members)
    return folder
