"""What is in the image files: each is read, hashed and decoded once, and remembered from run to run.

The memory is one Parquet file a data folder, below `cache_folder`. A file that has the size, the time of change and the
time of status change (``mtime``, ``ctime``) of last time is not read again. The inode is not asked: network file
systems make up new ones at every mount.
"""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlflow_ssl.datasets.cache import cache_folder
from mlflow_ssl.datasets.decode import decode

log = logging.getLogger(__name__)

RACY_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again within one tick of the file system's clock
(FAT's is 2 s) and look the same: it is not remembered. Git's rule."""

_STAMP = ("size", "mtime_ns", "ctime_ns")
_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        *((name, pa.int64()) for name in _STAMP),
        ("digest", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("reason", pa.string()),
    ],
    # another Pillow may read other files, and count the format up where a column or `decode` changes its meaning
    metadata={"mlflow_ssl.contents": "1", "pillow": PIL.__version__},
)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class BadImage:
    """A file that looks like an image and cannot be read as one."""

    path: str
    reason: str


class _Content(NamedTuple):
    """One file; it has no size where it could not be read at all, and a reason where it is no image."""

    size: int | None = None
    digest: str | None = None
    width: int | None = None
    height: int | None = None
    reason: str | None = None


def read_contents(root: Path, paths: Sequence[str]) -> tuple[pa.Table, list[BadImage]]:
    """Read every file that is new or has changed, side by side, and look the others up.

    A file is decoded here so that a broken one is known before the training begins and not hours into it.

    Args:
        root: the data folder.
        paths: relative paths below it, each once.

    Returns:
        The good files in the order of ``paths``, columns ``path``, ``size`` (bytes), ``digest`` (BLAKE2b of the
        content, 32 hexadecimal digits), ``width`` and ``height`` (pixels, upright); and the bad ones.
    """
    root = root.resolve()
    started = time.time_ns()
    stamps = _stamps(root, paths)
    cached = _load(root)
    rows = _find(cached, paths, stamps)
    known, unknown = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
    recalled = cached.take(rows[known])
    log.info("%d files, %d of them new or changed since they were last read", len(paths), len(unknown))
    contents: list[_Content] = []
    try:
        contents.extend(_read_files(root, [paths[number] for number in unknown.tolist()]))
    finally:  # an interrupted run, too, saves the next one what it has read
        read = unknown[: len(contents)]
        fresh = _tabulate([paths[number] for number in read.tolist()], stamps[read], contents)
        lasting = fresh.filter(_lasting(fresh, stamps[read], started))
        if len(lasting):
            _store(root, pa.concat_tables([recalled, lasting]), asked=paths)
    table = pa.concat_tables([recalled, fresh]).take(np.argsort(np.concatenate([known, unknown])))
    return _judge(table)


def _judge(table: pa.Table) -> tuple[pa.Table, list[BadImage]]:
    good = pc.is_null(table["reason"])
    bad = table.filter(pc.invert(good)).select(["path", "reason"]).to_pylist()
    contents = table.filter(good).select(["path", "size", "digest", "width", "height"]).combine_chunks()
    return contents, [BadImage(**image) for image in bad]


# the files


def _stamps(root: Path, paths: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return size, mtime and ctime of every file, shape ``(N, 3)``; -1 where there is none any more."""

    def stamp(path: str) -> tuple[int, int, int]:
        try:
            found = os.stat(f"{root}/{path}")  # noqa: PTH116 a string is 10 times faster here
        except OSError:
            return -1, -1, -1
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    return np.array(list(_side_by_side(stamp, paths, share=500)), dtype=np.int64).reshape(-1, 3)


def _read_files(root: Path, paths: Sequence[str]) -> Iterator[_Content]:
    return _side_by_side(lambda path: _read_file(root / path), paths, share=16)


def _side_by_side(function: Callable[[str], _Result], paths: Sequence[str], *, share: int) -> Iterator[_Result]:
    """Yield the function's results in order; a thread takes ``share`` paths at a time, as a task costs 50 µs."""
    shares = [paths[start : start + share] for start in range(0, len(paths), share)]
    with ThreadPoolExecutor() as pool:  # waiting, reading, hashing and decoding all release the interpreter lock
        for results in pool.map(lambda share: [function(path) for path in share], shares):
            yield from results


def _read_file(file: Path) -> _Content:
    try:
        data = file.read_bytes()
    except OSError as error:
        return _Content(reason=_one_line(error))
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        height, width, _ = decode(data).shape
    except MemoryError as error:  # of this machine, and not of the file
        return _Content(reason=_one_line(error))
    except Exception as error:
        return _Content(len(data), digest, reason=_one_line(error))
    return _Content(len(data), digest, width, height)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# the memory


def _tabulate(paths: Sequence[str], stamps: npt.NDArray[np.int64], contents: Sequence[_Content]) -> pa.Table:
    columns = {name: [getattr(content, name) for content in contents] for name in _Content._fields}
    times = {"mtime_ns": stamps[:, 1], "ctime_ns": stamps[:, 2]}
    return pa.table({"path": paths} | times | columns, schema=_SCHEMA)


def _lasting(fresh: pa.Table, stamps: npt.NDArray[np.int64], started: int) -> npt.NDArray[np.bool_]:
    """Return which files were read whole and had been left alone for long enough before that."""
    sizes = fresh["size"].fill_null(-2).to_numpy()
    lasting: npt.NDArray[np.bool_] = (sizes == stamps[:, 0]) & (stamps[:, 1:].max(axis=1) < started - RACY_NS)
    return lasting


def _find(cached: pa.Table, paths: Sequence[str], stamps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the row of every file, shape ``(N,)``; -1 where it is not there or has another stamp."""
    value_set = cached["path"].combine_chunks()
    rows = pc.index_in(pa.array(paths, pa.string()), value_set=value_set).fill_null(-1).to_numpy().astype(np.int64)
    hits = rows >= 0
    known = np.stack([cached[name].to_numpy() for name in _STAMP], axis=1)  # (M, 3)
    hits[hits] = (known[rows[hits]] == stamps[hits]).all(axis=1)
    return np.where(hits, rows, -1)


def _cache_file(root: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(root), digest_size=16).hexdigest()
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


def _store(root: Path, table: pa.Table, *, asked: Sequence[str]) -> None:
    """Write the table, and of what is there the files that were not asked for and are as they were."""
    there = _load(root)  # again: another run may have written meanwhile
    others = there.filter(pc.invert(pc.is_in(there["path"], value_set=pa.array(asked, pa.string()))))
    names = others["path"].to_pylist()
    others = others.filter(_find(others, names, _stamps(root, names)) >= 0)
    try:
        file = _cache_file(root)
        file.parent.mkdir(parents=True, exist_ok=True)
        # written beside and moved into place: nobody ever reads half of it
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            whole = Path(scratch, file.name)
            pq.write_table(pa.concat_tables([table, others]), whole, compression="zstd", write_page_checksum=True)
            whole.replace(file)
    except (OSError, RuntimeError) as error:
        log.info("the next run will read every file again, since the cache cannot be written: %s", _one_line(error))
