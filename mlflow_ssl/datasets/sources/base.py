"""What every source of images has in common: a table of what there is, and bytes by row."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlflow_ssl.datasets.bad_images import BadImage

FOUND = pa.schema(
    [
        ("path", pa.large_string()),
        ("class_name", pa.dictionary(pa.int32(), pa.string())),
        ("split", pa.dictionary(pa.int32(), pa.string())),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("ctime_ns", pa.int64()),
        ("offset", pa.int64()),
    ]
)
"""What a scan finds: one row an image, sorted by path, no path twice.

``path`` is relative to the source's root, with ``/``; ``class_name`` and ``split`` are empty where nothing names them;
``size`` is in bytes, ``mtime_ns`` and ``ctime_ns`` are the file's times of change and of status change; ``offset`` is
where the image begins in a file that holds several, 0 elsewhere.
"""


class Found(NamedTuple):
    """What a scan found: a table of schema `FOUND`, and what it could not look at."""

    table: pa.Table
    bad: list[BadImage]


class Reader(Protocol):
    """Bytes of images by row of a table. It can be pickled, and threads and forked processes may share it."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, row: int) -> bytes:
        """Return the bytes of one image file.

        Raises:
            OSError: if they cannot be read any more.
        """
        ...


class Source(ABC):
    """Where images come from.

    Args:
        root: absolute path of the folder or file; nothing outside it is read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def scan(self) -> Found:
        """Find all images.

        Raises:
            InputError: if there is nothing to look at, or no image.
        """

    def exist(self, paths: pa.Array) -> npt.NDArray[np.bool_]:
        """Return which images still exist, shape ``(N,)``, as far as that can be told quickly."""
        return np.ones(len(paths), dtype=bool)

    @abstractmethod
    def reader(self, table: pa.Table) -> Reader:
        """Return a reader of the rows of a table, which has at least ``path``, ``size`` and ``offset``."""
