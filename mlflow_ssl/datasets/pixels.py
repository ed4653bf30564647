"""Decoded images in one memory-mapped file, which all workers, processes and runs share.

Nobody fills it in advance: whoever first asks for an image decodes and writes it, while the first epoch trains. The
file holds a table of checksums, one a slot, and the slots, one for each distinct content. A slot counts once its
checksum stands in the table, which is written after it, and once its bytes agree with that; so it does not matter who
else writes the same slot at the same time, or is killed while writing. Nothing is locked.
"""

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_ssl.datasets.cache import cache_folder
from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

_FORMAT = f"1 pillow {PIL.__version__} opencv {cv2.__version__}"
"""What a file's bytes depend on beside images and size; it is part of the file's name."""

_SHARED_MEMORY = Path("/dev/shm")
_ROOM = 64 * 2**20
"""Bytes that are left free."""


def cached_size(
    width: npt.NDArray[np.int64], height: npt.NDArray[np.int64], shorter_side: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return width and height of images whose shorter side shrinks to ``shorter_side``; smaller ones stay as they are.

    Example:
        >>> cached_size(np.array([400, 100]), np.array([300, 50]), 150)
        (array([200, 100]), array([150,  50]))
    """
    scale = np.minimum(1.0, shorter_side / np.minimum(width, height))
    return np.rint(width * scale).astype(np.int64), np.rint(height * scale).astype(np.int64)


class PixelCache:
    """Decoded, resized images by content.

    Args:
        file: where they are.
        digests: of the distinct images, sorted.
        shapes: height and width of each, shape ``(N, 2)``.
    """

    def __init__(self, file: Path, digests: pa.Array, shapes: npt.NDArray[np.int64]) -> None:
        self.file = file
        self._digests = digests
        self._shapes = shapes
        sizes = 3 * shapes.prod(axis=1)
        self._ends = 4 * len(shapes) + np.cumsum(sizes)
        self._begins = self._ends - sizes
        self._writing = True
        self._open()

    @classmethod
    def open(
        cls,
        kind: str,
        *,
        digests: pa.Array,
        widths: npt.NDArray[np.int64],
        heights: npt.NDArray[np.int64],
        shorter_side: int,
    ) -> "PixelCache":
        """Open the file of some images, and make it where it is not there.

        Args:
            kind: ``ram`` or ``disk``.
            digests: of the images' contents; equal ones share a slot.
            widths: pixels of each image, upright.
            heights: likewise.
            shorter_side: pixels that the shorter side shrinks to.

        Raises:
            InputError: if there is not enough space.
        """
        order = pc.sort_indices(digests)
        distinct = pc.unique(digests.take(order))
        first = pc.index_in(distinct, value_set=digests).to_numpy()
        width, height = cached_size(widths[first], heights[first], shorter_side)
        name = hashlib.blake2b(f"{_FORMAT} {shorter_side}\n".encode(), digest_size=16)
        name.update("\n".join(distinct.to_pylist()).encode())
        file = _folder(kind) / f"{name.hexdigest()}.pixels"
        total = 4 * len(distinct) + int((3 * width * height).sum())
        _check_space(kind, file, total)
        return cls(file, distinct, np.stack([height, width], axis=1))

    def rows(self, digests: pa.Array) -> "CachedRows":
        """Return the images with these contents, in this order."""
        return CachedRows(self, pc.index_in(digests, value_set=self._digests).to_numpy().astype(np.int64))

    @property
    def num_images(self) -> int:
        """Distinct images."""
        return len(self._shapes)

    @property
    def num_ready(self) -> int:
        """Distinct images that have been written."""
        return int(np.count_nonzero(self._sums))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def get(self, slot: int, decode: Callable[[], Pixels]) -> Pixels:
        """Return the pixels ``(H, W, 3)`` of a slot, read-only; ``decode`` gives the image where it is missing."""
        begin, end = self._begins[slot], self._ends[slot]
        if self._sums[slot]:
            pixels = np.frombuffer(self._map, dtype=np.uint8, count=end - begin, offset=begin)
            if self._checked[slot] or _checksum(pixels) == self._sums[slot]:
                self._checked[slot] = True
                return pixels.reshape(*self._shapes[slot], 3)
        pixels = _resized(decode(), *self._shapes[slot].tolist())
        self._write(slot, pixels)
        return pixels

    def _write(self, slot: int, pixels: Pixels) -> None:
        if not self._writing:
            return
        checksum = np.uint32(_checksum(pixels))
        try:  # not through the map: a full disk would be a signal that ends the process
            _write_all(self._descriptor, pixels.tobytes(), int(self._begins[slot]))
            _write_all(self._descriptor, checksum.tobytes(), 4 * slot)
        except OSError as error:
            self._writing = False
            log.warning("images are no longer cached: %s: %s", self.file, error.strerror)

    # the file, which each process opens for itself

    def _open(self) -> None:
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._descriptor = _open_private(self.file)
        if os.fstat(self._descriptor).st_size not in (0, self.nbytes):  # not of our making
            os.close(self._descriptor)
            self.file.unlink()
            self._descriptor = _open_private(self.file)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)  # says that the file is in use
        os.ftruncate(self._descriptor, self.nbytes)  # sparse; nothing happens where it has that size
        self._map = mmap.mmap(self._descriptor, self.nbytes, access=mmap.ACCESS_READ) if self.nbytes else b""
        self._sums = np.frombuffer(self._map, dtype=np.uint32, count=self.num_images)
        self._checked = np.zeros(self.num_images, dtype=bool)
        self._owner = os.getpid()

    def close(self) -> None:
        """Let go of the file; one in memory is removed by the last that does."""
        if self._owner != os.getpid():  # a forked worker
            return
        if self.file.is_relative_to(_SHARED_MEMORY):
            _remove_unused(self._descriptor, self.file)
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._owner = -1

    def __del__(self) -> None:
        """Close."""
        if getattr(self, "_owner", -1) == os.getpid():
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process opens the file by."""
        return {"file": self.file, "digests": self._digests, "shapes": self._shapes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file again."""
        self.__init__(**state)  # type: ignore[misc]


class CachedRows:
    """Some of the images of a cache, by row."""

    def __init__(self, cache: PixelCache, slots: npt.NDArray[np.int64]) -> None:
        self._cache = cache
        self._slots = slots

    def get(self, row: int, decode: Callable[[], Pixels]) -> Pixels:
        """Return the pixels ``(H, W, 3)`` of a row; ``decode`` gives the image where it is not there yet."""
        return self._cache.get(int(self._slots[row]), decode)


def _resized(image: Pixels, height: int, width: int) -> Pixels:
    if image.shape[:2] != (height, width):
        resized: Any = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        image = resized
    image = np.ascontiguousarray(image)
    image.flags.writeable = False
    return image


def _checksum(pixels: Any) -> int:
    return zlib.crc32(pixels) | 1  # never 0, which means that nothing is there


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    data = memoryview(content)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _folder(kind: str) -> Path:
    if kind == "disk":
        return cache_folder() / "pixels"
    if not _SHARED_MEMORY.is_dir():
        raise InputError("datamodule.cache=ram needs /dev/shm, which this system has not; use cache=disk")
    folder = _SHARED_MEMORY / f"mlflow_ssl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or folder.is_symlink():
        raise InputError(f"datamodule.cache=ram finds {folder} to be somebody else's; use cache=disk")
    for file in folder.glob("*.pixels"):  # of runs that were killed
        descriptor = _open_private(file)
        _remove_unused(descriptor, file)
        os.close(descriptor)
    return folder


def _open_private(file: Path) -> int:
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _remove_unused(descriptor: int, file: Path) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()


def _check_space(kind: str, file: Path, total: int) -> None:
    """Refuse a cache that would not fit.

    Raises:
        InputError: naming what it needs and what there is.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    there = file.stat().st_blocks * 512 if file.exists() else 0
    needed = total - there + _ROOM
    free = shutil.disk_usage(file.parent).free
    if kind == "ram":
        free = min(free, psutil.virtual_memory().available)
    if needed > free:
        remedy = "use cache=disk, or start a container with a larger --shm-size" if kind == "ram" else "make room"
        raise InputError(
            f"datamodule.cache={kind} needs {needed / 1e9:.1f} GB in {file.parent}, which has {free / 1e9:.1f} GB free;"
            f" {remedy}, or lower datamodule.cache_shorter_side"
        )
