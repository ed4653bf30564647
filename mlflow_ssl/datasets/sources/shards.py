"""WebDataset shards: tar files whose members make samples by their names."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from braceexpand import braceexpand

from mlflow_ssl.datasets.bad_images import BadImage
from mlflow_ssl.datasets.decode import EXTENSIONS
from mlflow_ssl.datasets.progress import Counting
from mlflow_ssl.datasets.sources.base import FOUND, Found, Source
from mlflow_ssl.datasets.sources.shard_memory import ShardMemory
from mlflow_ssl.datasets.tables import column, concat, constant, sort_by_path
from mlflow_ssl.errors import InputError

CLASS_KEYS = ("class_name", "label", "cls")
"""Keys of a sample's ``.json`` that may hold its class."""

KEPT_OPEN = 64
"""Shards that a reader keeps open at a time; a process may have 1,024 files open, for all it does."""


class ShardSource(Source):
    """Images in tar files of one folder; a sample is the members of one name up to the first dot.

    The class is the text of the member ``.cls``, or else one of `CLASS_KEYS` in ``.json``. The path of an image is the
    shard's name and the member's: ``shard-000.tar/0001.jpg``.

    Args:
        data_path: a tar file, a pattern such as ``shards-{000..127}.tar``, or a folder of tar files. They are local
            files: webdataset's pipes and addresses, which run commands, are not for a path that a stored config names.
        labels: ``folders``: samples have the class they name; ``none``: no image has one.

    Raises:
        InputError: if there is no such file.
    """

    def __init__(self, data_path: str, *, labels: str = "folders") -> None:
        self.shards = _expand(data_path)
        super().__init__(self.shards[0].parent)
        self.labels = labels

    def scan(self) -> Found:
        """Read the headers of all members, and the small ones that name classes, of shards that are not known yet.

        Raises:
            InputError: if there is no image.
        """
        parts: dict[Path, Found] = {}
        with Counting("scanning", "images") as counting:
            for shard, part in ShardMemory(_read_headers).find(self.shards):
                parts[shard] = part
                counting.advance(len(part.table))
        # in the order of the shards, in whichever they became known
        bad = [image for shard in self.shards for image in parts[shard].bad]
        found = sort_by_path(concat((parts.pop(shard).table for shard in self.shards), FOUND))
        if not len(found) and not bad:
            raise InputError(f"datamodule.data_path must hold images, found none in {len(self.shards)} shards")
        return Found(self._labelled(found), bad)

    def reader(self, table: pa.Table) -> "ShardReader":
        """Return a reader of the rows of a table."""
        return ShardReader(self.root, column(table, "path"), table["offset"].to_numpy(), table["size"].to_numpy())

    def _labelled(self, found: pa.Table) -> pa.Table:
        if self.labels != "none":
            return found
        place = found.schema.get_field_index("class_name")
        return found.set_column(place, FOUND.field("class_name"), constant("", len(found)))


class ShardReader:
    """Bytes of members of tar files, by row. A file is opened when it is first asked for."""

    def __init__(self, root: Path, paths: pa.Array, offsets: Sequence[int] | Any, sizes: Sequence[int] | Any) -> None:
        self._root = root
        self._paths = paths
        self._offsets = offsets
        self._sizes = sizes
        self._open = lru_cache(KEPT_OPEN)(_OpenFile)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._paths)

    def __getitem__(self, row: int) -> bytes:
        """Return what one member holds.

        Raises:
            OSError: if it cannot be read any more.
        """
        size = int(self._sizes[row])
        file = self._open(self._root / shard_of(self._paths[row].as_py()))
        # it names the place to read from: threads and forked processes share the open file and no position in it
        data = os.pread(file.descriptor, size, int(self._offsets[row]))
        if len(data) < size:
            raise OSError("the shard ends before the image does")
        return data

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open files."""
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open them again when they are needed."""
        self.__dict__.update(state, _open=lru_cache(KEPT_OPEN)(_OpenFile))


class _OpenFile:
    """A file that is closed once no thread reads it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def shard_of(path: str) -> str:
    """Return the name of the shard that an image is in.

    Example:
        >>> shard_of("shard-000.tar/cats/0001.jpg")
        'shard-000.tar'
    """
    return path.partition(".tar/")[0] + ".tar"


def _expand(data_path: str) -> list[Path]:
    try:
        names = list(braceexpand(str(Path(data_path).expanduser().absolute())))
    except ValueError as error:
        raise InputError(f"datamodule.data_path must be a pattern such as shards-{{000..127}}.tar: {error}") from error
    shards = [Path(name) for name in dict.fromkeys(names)]
    if len(shards) == 1 and shards[0].is_dir():
        shards = sorted(shards[0].glob("[!.]*.tar"))
    if not shards:
        raise InputError(f"datamodule.data_path must hold .tar files, found none in {data_path}")
    _check_names(shards, data_path)
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise InputError(f"datamodule.data_path must name files, {len(missing)} are none, the first is {missing[0]}")
    return shards


def _check_names(shards: Sequence[Path], data_path: str) -> None:
    if any(shard.suffix != ".tar" for shard in shards):
        raise InputError(
            f"datamodule.data_path must name .tar files, which images can be read from the middle of, got {data_path}; "
            "unpack others, such as x.tar.gz with gunzip"
        )
    if len({shard.parent for shard in shards}) > 1:
        raise InputError(f"datamodule.data_path must name shards of one folder, got {data_path}")


def _read_headers(shard: Path, stamp: os.stat_result) -> Found:
    images: dict[str, tuple[str, int, int]] = {}  # by key: the member, where it begins, and its size
    classes: dict[str, str] = {}
    bad: list[BadImage] = []
    for member, content in _members(shard, bad):
        key, ending = _key(member.name)
        if content is not None:
            if ending == "cls" or key not in classes:
                classes[key] = _class_name(ending, content)
        elif key in images:
            bad.append(BadImage(f"{shard.name}/{member.name}", "is the second image of its sample"))
        else:
            images[key] = (member.name, member.offset_data, member.size)
    rows = {
        "path": [f"{shard.name}/{name}" for name, _, _ in images.values()],
        "class_name": [classes.get(key, "") for key in images],
        "split": [""] * len(images),
        "size": [size for _, _, size in images.values()],
        "mtime_ns": np.full(len(images), stamp.st_mtime_ns),
        "ctime_ns": np.full(len(images), stamp.st_ctime_ns),
        "offset": [offset for _, offset, _ in images.values()],
    }
    return Found(pa.table({name: pa.array(rows[name], FOUND.field(name).type) for name in FOUND.names}), bad)


def _members(shard: Path, bad: list[BadImage]) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Yield the images, without their content, and the members that name classes, with it."""
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = shard.stat().st_size
            for member in tar:
                if not _is_sample(member, shard, bad):
                    continue
                ending = _key(member.name)[1]
                if f".{ending.rpartition('.')[2]}" in EXTENSIONS:
                    if member.offset_data + member.size <= end:  # or the next step says that the shard breaks off
                        yield member, None
                elif ending in ("cls", "json"):
                    content = tar.extractfile(member)
                    yield member, content.read() if content else b""
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a broken header for the end
                bad.append(BadImage(shard.name, "cannot be read to its end: broken header"))
    except (tarfile.TarError, OSError, EOFError) as error:
        bad.append(BadImage(shard.name, f"cannot be read to its end: {error}"))


def _is_sample(member: tarfile.TarInfo, shard: Path, bad: list[BadImage]) -> bool:
    """Return whether a member is a file of some sample, which hidden ones are not."""
    if not member.isreg() or member.sparse or not _key(member.name)[0].rpartition("/")[2]:
        return False
    try:
        member.name.encode()
    except UnicodeEncodeError:
        path = f"{shard.name}/{member.name}".encode(errors="replace").decode()
        bad.append(BadImage(path, "its name is not UTF-8; rename it"))
        return False
    return True


def _key(name: str) -> tuple[str, str]:
    """Return the name of the sample and the ending of the member: what is before and behind the first dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _class_name(ending: str, content: bytes) -> str:
    if ending == "cls":
        return content.decode(errors="replace").strip()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    named = [values[key] for key in CLASS_KEYS if key in values] if isinstance(values, dict) else []
    return str(named[0]) if named and named[0] is not None else ""
