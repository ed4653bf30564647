"""What is in the image files: each is read, hashed and decoded once, and remembered from run to run.

The memory is one Parquet file a source, below `cache_folder`. A file that has the size, the time of change and the
time of status change (``mtime``, ``ctime``) of last time is not read again. The inode is not asked: network file
systems make up new ones at every mount.
"""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlflow_ssl.datasets.bad_images import BadImage
from mlflow_ssl.datasets.cache import cache_folder
from mlflow_ssl.datasets.decode import DecodeError, measure
from mlflow_ssl.datasets.progress import Counting
from mlflow_ssl.datasets.side_by_side import side_by_side
from mlflow_ssl.datasets.sources.base import Reader, Source
from mlflow_ssl.datasets.tables import column, concat, nulls, pieces

log = logging.getLogger(__name__)

RACY_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again within one tick of the file system's clock
(FAT's is 2 s) and look the same: it is not remembered. Git's rule."""

_STAMP = ("size", "mtime_ns", "ctime_ns")
_CONTENT = [("digest", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
_SCHEMA = pa.schema(
    [("path", pa.large_string()), *((name, pa.int64()) for name in _STAMP), *_CONTENT, ("reason", pa.string())],
    # another Pillow may read other files, and count the format up where a column or `decode` changes its meaning
    metadata={"mlflow_ssl.contents": "2", "pillow": PIL.__version__},
)
_READ = pa.schema([*_CONTENT, ("reason", pa.string())])

_SHARE = 16
"""Files that one call reads: a call in a thread costs 50 µs."""


class _Content(NamedTuple):
    """One file: no image where there is a reason, and no digest where it could not be read at all."""

    digest: str | None = None
    width: int | None = None
    height: int | None = None
    reason: str | None = None


def read_contents(source: Source, found: pa.Table, *, max_pixels: int | None = None) -> tuple[pa.Table, list[BadImage]]:
    """Read every file that is new or has changed, side by side, and look the others up.

    A file is decoded here so that a broken one is known before the training begins and not hours into it.

    Args:
        source: where the images are.
        found: what its scan has found.
        max_pixels: see `mlflow_ssl.datasets.decode.measure`.

    Returns:
        The rows of the good files, with the columns ``digest`` (see `content_digest`),
        ``width`` and ``height`` (pixels, upright) behind; and the bad ones.
    """
    started = time.time_ns()
    cached = _load(source.root)
    rows = _find(cached, found)
    known, unknown = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
    recalled = cached.take(rows[known])
    log.info("%d images, %d of them new or changed since they were last read", len(found), len(unknown))
    new = found.take(unknown)
    contents: list[pa.Table] = []
    try:
        for share in _read(source.reader(new), len(new), max_pixels=max_pixels):
            contents.append(share)
    finally:  # an interrupted run, too, saves the next one what it has read
        fresh = _with_contents(new, concat(contents, _READ))
        lasting = fresh.filter(_lasting(fresh, started))
        if len(lasting):
            _store(source, pa.concat_tables([recalled, lasting]), asked=column(found, "path"))
    together = pa.concat_tables([recalled, fresh]).take(np.argsort(np.concatenate([known, unknown])))
    return _judge(found, together.combine_chunks())


def content_digest(data: bytes) -> str:
    """Return what stands for a file's content: its BLAKE2b, 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def without_contents(found: pa.Table) -> pa.Table:
    """Return the rows with empty columns ``digest``, ``width`` and ``height`` behind: nothing was read."""
    for name, kind in _CONTENT:
        found = found.append_column(name, nulls(len(found), kind))
    return found


def _judge(found: pa.Table, contents: pa.Table) -> tuple[pa.Table, list[BadImage]]:
    good = pc.is_null(contents["reason"])
    bad = contents.filter(pc.invert(good)).select(["path", "reason"]).to_pylist()
    for name, _ in _CONTENT:
        found = found.append_column(name, contents[name])
    return (found.filter(good).combine_chunks() if bad else found), [BadImage(**image) for image in bad]


# the files


def _read(reader: Reader, count: int, *, max_pixels: int | None) -> Iterator[pa.Table]:
    """Yield what is in the files, in their order, as tables of schema `_READ`."""

    def read(rows: range) -> pa.Table:
        return _tabulate([_read_file(reader, row, max_pixels=max_pixels) for row in rows])

    with Counting("checking", "images", count) as counting:
        for share in side_by_side(read, pieces(range(count), _SHARE)):  # reading, hashing and decoding free the lock
            counting.advance(len(share))
            yield share


def _read_file(reader: Reader, row: int, *, max_pixels: int | None) -> _Content:
    try:
        data = reader[row]
    except OSError as error:
        return _Content(reason=f"cannot be read: {error.strerror or error}")
    digest = content_digest(data)
    try:
        width, height = measure(data) if max_pixels is None else measure(data, max_pixels=max_pixels)
    except DecodeError as error:
        return _Content(digest, reason=str(error))
    except MemoryError:  # of this machine, and not of the file
        return _Content(reason="takes more memory to decode than this machine has")
    return _Content(digest, width, height)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# the memory


def _tabulate(contents: list[_Content]) -> pa.Table:
    return pa.table(list(zip(*contents, strict=True)), schema=_READ)


def _with_contents(new: pa.Table, contents: pa.Table) -> pa.Table:
    """Return the memory's rows of the files that have been read: the first ones."""
    read = new.slice(0, len(contents)).select(["path", *_STAMP])
    for name in _READ.names:
        read = read.append_column(name, contents[name])
    return read.cast(_SCHEMA)


def _lasting(fresh: pa.Table, started: int) -> npt.NDArray[np.bool_]:
    """Return which files could be read and had been left alone for long enough before that."""
    changed = np.maximum(fresh["mtime_ns"].to_numpy(), fresh["ctime_ns"].to_numpy())
    readable = pc.is_valid(fresh["digest"]).to_numpy()
    lasting: npt.NDArray[np.bool_] = readable & (changed < started - RACY_NS)
    return lasting


def _find(cached: pa.Table, files: pa.Table) -> npt.NDArray[np.int64]:
    """Return the row of every file, shape ``(N,)``; -1 where it is not there or has another stamp."""
    value_set = column(cached, "path")
    rows = pc.index_in(column(files, "path"), value_set=value_set).fill_null(-1).to_numpy().astype(np.int64)
    hits = rows >= 0
    for name in _STAMP:
        hits[hits] = cached[name].to_numpy()[rows[hits]] == files[name].to_numpy()[hits]
    return np.where(hits, rows, -1)


def _cache_file(root: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=16).hexdigest()
    return cache_folder() / "contents" / f"{name}.parquet"


def _load(root: Path) -> pa.Table:
    nothing = _SCHEMA.empty_table()
    try:
        with pq.ParquetFile(_cache_file(root), page_checksum_verification=True) as file:
            table = file.read()
    except FileNotFoundError:
        return nothing
    except (OSError, RuntimeError, pa.ArrowException) as error:
        log.info("every file is read again, since the cache cannot be: %s", _one_line(error))
        return nothing
    return table if table.schema.equals(_SCHEMA, check_metadata=True) else nothing


def _store(source: Source, table: pa.Table, *, asked: pa.Array) -> None:
    """Write the table, and of what is remembered the files that were not asked for and still exist."""
    there = _load(source.root)  # again: another run may have written meanwhile
    others = there.filter(pc.invert(pc.is_in(there["path"], value_set=asked)))
    others = others.filter(pa.array(source.exist(column(others, "path"))))
    try:
        file = _cache_file(source.root)
        file.parent.mkdir(parents=True, exist_ok=True)
        # written beside and moved into place: nobody ever reads half of it
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            whole = Path(scratch, file.name)
            pq.write_table(pa.concat_tables([table, others]), whole, compression="zstd", write_page_checksum=True)
            whole.replace(file)
    except (OSError, RuntimeError) as error:
        log.info("the next run will read every file again, since the cache cannot be written: %s", _one_line(error))
