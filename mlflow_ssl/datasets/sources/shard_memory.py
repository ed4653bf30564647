"""What the headers of shards say, remembered from run to run; processes that ask at once share the reading.

The memory is one small file a shard, below `cache_folder`: an Arrow stream, and a checksum behind it. Its name stands
for the shard's path, size, time of change and time of status change (``mtime``, ``ctime``), so that a shard which
changes has another. Each is moved into place whole, and may be removed at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mlflow_ssl.datasets.bad_images import BadImage
from mlflow_ssl.datasets.cache import cache_folder
from mlflow_ssl.datasets.contents import RACY_NS
from mlflow_ssl.datasets.side_by_side import side_by_side_if_slow
from mlflow_ssl.datasets.sources.base import FOUND, Found

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 600.0
"""Others that read headers are not waited for longer than this: they may have been stopped."""

_FORMAT = "1"
"""Counted up where `FOUND`, or what a scan makes of a shard, changes its meaning."""

_SLOW_SECONDS = 1e-3
"""A local disk takes less to give what is remembered of a shard, or what is in the kernel's memory of its headers."""

_POLL_SECONDS = 0.02
_DIGEST_BYTES = 16


class _Shard(NamedTuple):
    """A shard, and what tells it from what it was or will be."""

    path: Path
    stamp: os.stat_result

    @property
    def digest(self) -> bytes:
        """What stands for it."""
        stamp = (self.stamp.st_size, self.stamp.st_mtime_ns, self.stamp.st_ctime_ns)
        return _digest(json.dumps([_FORMAT, *stamp, ""]).encode() + os.fsencode(self.path))

    @property
    def settled(self) -> bool:
        """Whether it has been left alone for so long that another change would show, see `RACY_NS`."""
        return max(self.stamp.st_mtime_ns, self.stamp.st_ctime_ns) < time.time_ns() - RACY_NS


class ShardMemory:
    """What is known of shards, and who finds out the rest.

    Args:
        read: reads the headers of a shard, which has this stamp.
    """

    def __init__(self, read: Callable[[Path, os.stat_result], Found]) -> None:
        self._read = read
        self._folder = _make_folder()
        self._claims = _Claims(self._folder)
        self._refusal: OSError | None = None

    def find(self, shards: Sequence[Path]) -> Iterator[tuple[Path, Found]]:
        """Yield each shard and what is in it, in no order that could be relied on.

        Of several processes each reads the shards that no other is reading, and waits for those in the end.
        """
        taken = []
        with self._claims:
            for shard, found in side_by_side_if_slow(self._recall_or_read, shards, slow_seconds=_SLOW_SECONDS):
                if found is None:
                    taken.append(shard)
                else:
                    yield shard.path, found
            until = time.monotonic() + PATIENCE_SECONDS
            for shard in taken:
                with self._claims.on(shard, until=until):
                    found = self._recall(shard) or self._read_and_remember(shard)
                yield shard.path, found
        if self._refusal:
            log.info("the next run reads headers of shards again, since the cache cannot be written: %s", self._refusal)

    def _recall_or_read(self, path: Path) -> tuple[_Shard, Found | None]:
        """Return what is in a shard; None where another process is just reading it."""
        shard = _Shard(path, path.stat())
        if found := self._recall(shard):
            return shard, found
        with self._claims.on(shard) as ours:
            # once more: another process may have read it meanwhile
            return shard, (self._recall(shard) or self._read_and_remember(shard)) if ours else None

    def _read_and_remember(self, shard: _Shard) -> Found:
        settled = shard.settled  # before it is read
        found = self._read(*shard)
        broken_off = any(image.path == shard.path.name for image in found.bad)  # it may have been the network
        if self._folder and settled and not broken_off and not self._refusal:
            self._remember(self._folder, shard, found)
        return found

    # the files

    def _recall(self, shard: _Shard) -> Found | None:
        if self._folder is None:
            return None
        try:
            return _unpack((self._folder / _file_name(shard)).read_bytes(), shard.path.name)
        except (OSError, ValueError, pa.ArrowException):
            return None

    def _remember(self, folder: Path, shard: _Shard, found: Found) -> None:
        try:
            # written beside and moved into place: nobody ever reads half of it
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                whole = Path(scratch, _file_name(shard))
                whole.write_bytes(_pack(found))
                whole.replace(folder / whole.name)
        except OSError as error:
            self._refusal = error


def _make_folder() -> Path | None:
    try:
        folder = cache_folder() / "shards"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        log.info("the headers of shards are read at each start, since there is no cache: %s", error)
        return None
    return folder


def _file_name(shard: _Shard) -> str:
    return f"{shard.digest.hex()}.arrow"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _pack(found: Found) -> bytes:
    bad = json.dumps([(image.path, image.reason) for image in found.bad])
    table = found.table.replace_schema_metadata({"bad": bad})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data + _digest(data)


def _unpack(data: bytes, name: str) -> Found:
    """Return what was packed of the shard of this name.

    Raises:
        ValueError: if it is not that, or not whole.
    """
    stream = data[:-_DIGEST_BYTES]
    if _digest(stream) != data[-_DIGEST_BYTES:]:
        raise ValueError("is damaged")
    table = pa.ipc.open_stream(stream).read_all()
    # a path says which file is read
    if table.schema != FOUND or not pc.all(pc.starts_with(table["path"], f"{name}/"), min_count=0).as_py():
        raise ValueError("is something else")
    bad = [BadImage(*image) for image in json.loads(table.schema.metadata[b"bad"])]
    return Found(table.replace_schema_metadata(None), bad)


class _Claims:
    """Which process reads which shard: a byte of one file for each is locked meanwhile.

    Such locks end with their process, however that ends. Where there are none, each process reads every shard.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> None:
        with contextlib.suppress(OSError):
            if self._folder:
                self._descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @contextlib.contextmanager
    def on(self, shard: _Shard, *, until: float = 0.0) -> Iterator[bool]:
        """Claim a shard for as long as the block lasts; give whether it is this process's.

        Args:
            shard: to be claimed.
            until: when another process is not waited for any longer, by `time.monotonic`.
        """
        place = int.from_bytes(shard.digest[:6], "big")  # a byte for two shards would do no harm
        while not (ours := self._lock(place)) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        try:
            yield ours
        finally:
            if ours and self._descriptor is not None:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, place)

    def _lock(self, place: int) -> bool:
        if self._descriptor is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):  # POSIX leaves open which
            return False
        except OSError:  # a file system without locks
            return True
        return True
