"""Decoded images in one memory-mapped file, which all workers, processes and runs share.

Nobody fills it in advance: whoever first asks for an image decodes and writes it, while the first epoch trains. The
file holds a table of checksums, one a slot, and the slots, one for each distinct content. A slot counts once its
checksum stands in the table, which is written after it, and once its bytes agree with that; so it does not matter who
else writes the same slot at the same time, or is killed while writing.

No lock is taken to read or to write. A file in memory has a lease, a shared ``flock`` that the system ends with its
process however that ends: whoever can lock the file alone knows that it is unused and removes it.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import stat
import weakref
import zlib
from collections.abc import Iterator
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
        decode_at_least: int | None = None,
    ) -> "PixelCache":
        """Open the file of some images, and make it where it is not there.

        Args:
            kind: ``ram`` or ``disk``.
            digests: of the images' contents; equal ones share a slot.
            widths: pixels of each image, upright.
            heights: likewise.
            shorter_side: pixels that the shorter side shrinks to.
            decode_at_least: what the images are decoded with, see `mlflow_ssl.datasets.decode.decode`: it changes
                pixels, so another value is another file.

        Raises:
            InputError: if a digest is missing, ``decode_at_least`` is too small, there is not enough space, or the
                file cannot be used.
        """
        if digests.null_count:
            raise InputError("datamodule.cache needs to know the images' contents and sizes; set datamodule.verify=all")
        if decode_at_least is not None and decode_at_least < shorter_side:
            raise InputError(
                "datamodule.decode_at_least must be null, or at least datamodule.cache_shorter_side, which is "
                f"{shorter_side}, got {decode_at_least}"
            )
        distinct, first = _distinct(digests)
        width, height = cached_size(widths[first], heights[first], shorter_side)
        name = f"{_name(distinct, shorter_side, decode_at_least)}.pixels"
        total = 4 * len(distinct) + int((3 * width * height).sum())
        try:
            file = _folder(kind, keep=name) / name
            _check_space(kind, file, total)
            return cls(file, distinct, np.stack([height, width], axis=1))
        except OSError as error:
            remedy = "set MLFLOW_SSL_CACHE to another folder, or" if kind == "disk" else "use cache=disk or"
            raise InputError(
                f"datamodule.cache={kind} must have a file to write, got {error}; {remedy} cache=none"
            ) from error

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

    def find(self, slot: int) -> Pixels | None:
        """Return the pixels ``(H, W, 3)`` of a slot, read-only; None where they are missing."""
        if not self._sums[slot]:
            return None
        begin, end = self._begins[slot], self._ends[slot]
        pixels = np.frombuffer(self._map, dtype=np.uint8, count=end - begin, offset=begin)
        if not self._checked[slot] and _checksum(pixels) != self._sums[slot]:
            return None
        self._checked[slot] = True
        return pixels.reshape(*self._shapes[slot], 3)

    def store(self, slot: int, image: Pixels) -> Pixels:
        """Keep a decoded image; return what `find` will."""
        height, width = self._shapes[slot].tolist()
        if image.shape[0] < height or image.shape[1] < width:  # is not what was measured
            return image
        pixels = _resized(image, height, width)
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
        in_memory = self.file.parent.parent == _SHARED_MEMORY
        self._descriptor = (_open_leased if in_memory else _open_ours)(self.file, self.nbytes)
        # lets go when this object does and at the end of the process, unlike `__del__`
        self._let_go = weakref.finalize(self, _let_go, os.getpid(), self._descriptor, self.file, leased=in_memory)
        os.ftruncate(self._descriptor, self.nbytes)  # sparse; nothing happens where it has that size
        if self.num_images and hasattr(os, "posix_fallocate"):
            # to read a hole through a map of a tmpfs takes memory, and where none is left that is a signal: SIGBUS
            os.posix_fallocate(self._descriptor, 0, 4 * self.num_images)
        self._map = mmap.mmap(self._descriptor, self.nbytes, access=mmap.ACCESS_READ) if self.nbytes else b""
        self._sums = np.frombuffer(self._map, dtype=np.uint32, count=self.num_images)
        self._checked = np.zeros(self.num_images, dtype=bool)

    def close(self) -> None:
        """Let go of the file; one in memory is removed by the last that does. Images are no longer written."""
        self._writing = False  # the descriptor's number may soon be another file's
        self._let_go()

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

    def find(self, row: int) -> Pixels | None:
        """Return the pixels ``(H, W, 3)`` of a row, read-only; None where they are not there yet."""
        return self._cache.find(int(self._slots[row]))

    def store(self, row: int, image: Pixels) -> Pixels:
        """Keep the decoded image of a row; return what `find` will."""
        return self._cache.store(int(self._slots[row]), image)


def _distinct(digests: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Return the distinct digests, sorted, and a row of each, shape ``(N,)``."""
    order = pc.sort_indices(digests)
    ordered = digests.take(order)
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = pc.not_equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    return ordered.filter(pa.array(new)), order.to_numpy()[new].astype(np.int64)


def _name(distinct: pa.Array, shorter_side: int, decode_at_least: int | None) -> str:
    name = hashlib.blake2b(f"{_FORMAT} {shorter_side} {decode_at_least}\n".encode(), digest_size=16)
    lines = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(distinct)], pa.int32()), distinct), "\n")
    name.update(lines[0].as_buffer())
    return name.hexdigest()


def _resized(image: Pixels, height: int, width: int) -> Pixels:
    if image.shape[:2] != (height, width):
        resized: Any = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        image = resized
    image = np.ascontiguousarray(image).view()  # the caller may go on writing to its own
    image.flags.writeable = False
    return image


def _checksum(pixels: Any) -> int:
    return zlib.crc32(pixels) | 1  # never 0, which means that nothing is there


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    data = memoryview(content)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


# where files are


def _folder(kind: str, *, keep: str) -> Path:
    """Return the folder of the files; of those in memory, remove what killed runs have left, except ``keep``."""
    if kind == "disk":
        folder = cache_folder() / "pixels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    if not _SHARED_MEMORY.is_dir():
        raise InputError("datamodule.cache=ram needs /dev/shm, which this system has not; use cache=disk")
    folder = _SHARED_MEMORY / f"mlflow_ssl-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # everybody can write where it is: it may be somebody else's, or a link
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InputError(f"datamodule.cache=ram must have {folder} for this user alone; remove it, or use cache=disk")
    _remove_unused(folder, keep=keep)
    return folder


def _open_leased(file: Path, nbytes: int) -> int:
    while True:
        descriptor = _open_ours(file, nbytes)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_at(descriptor, file):
            return descriptor
        os.close(descriptor)  # its last user removed it meanwhile


def _open_ours(file: Path, nbytes: int) -> int:
    """Open a file of ours, in place of whatever else there is under its name."""
    try:
        descriptor = _open_private(file)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES):  # a link, or somebody else's
            raise
    else:
        if _is_ours(os.fstat(descriptor), file.parent, nbytes):
            return descriptor
        os.close(descriptor)
    file.unlink(missing_ok=True)
    return _open_private(file)


def _is_ours(found: os.stat_result, folder: Path, nbytes: int) -> bool:
    # a file server may give all files to one user: then the folder is that user's, too
    ours = found.st_uid in (os.getuid(), folder.stat().st_uid)
    return stat.S_ISREG(found.st_mode) and ours and found.st_size in (0, nbytes)


def _open_private(file: Path) -> int:
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)


def _let_go(owner: int, descriptor: int, file: Path, *, leased: bool) -> None:
    if os.getpid() != owner:  # a forked worker
        return
    if leased:  # by name: a map keeps its file open, and the lease with it
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
    if leased:
        _remove_unused(file.parent)


def _remove_unused(folder: Path, *, keep: str | None = None) -> None:
    """Remove the files without a lease."""
    for file in folder.glob("*.pixels"):
        if file.name != keep:
            with contextlib.suppress(OSError):  # in use, or gone
                _remove_if_unused(file)


def _remove_if_unused(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, file):
            file.unlink()
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False


def _check_space(kind: str, file: Path, total: int) -> None:
    """Refuse a cache that would not fit.

    Raises:
        InputError: naming what it needs and what there is.
    """
    there = file.lstat().st_blocks * 512 if file.exists() else 0
    if there >= total:
        return
    needed = total - there + _ROOM
    for place, free, remedy in _limits(kind, file.parent):
        if needed > free:
            raise InputError(
                f"datamodule.cache={kind} needs {needed / 1e9:.1f} GB in {place}, which has {free / 1e9:.1f} GB free; "
                f"{remedy}, or lower datamodule.cache_shorter_side"
            )


def _limits(kind: str, folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield what the file takes space of, how many bytes are free there, and what helps."""
    free = shutil.disk_usage(folder).free
    if kind == "disk":
        yield str(folder), free, "make room, set MLFLOW_SSL_CACHE to a folder on another disk"
    else:
        yield str(_SHARED_MEMORY), free, "use cache=disk, start a container with a larger --shm-size"
        yield "memory", psutil.virtual_memory().available, "use cache=disk"
