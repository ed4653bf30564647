"""The one table of a data set: which images there are, of which class, in which split, with which content."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from mlflow_ssl.datasets.bad_images import BadImage
from mlflow_ssl.datasets.contents import read_contents
from mlflow_ssl.datasets.sources.folder import FolderSource
from mlflow_ssl.datasets.splits import SPLITS
from mlflow_ssl.datasets.tables import Picked, codes, column, decoded, encode, keep, pieces
from mlflow_ssl.errors import InputError

UNLABELLED = -1
"""Label of an image without a class."""

_SHARE = 65_536
"""Rows that are looked at in one go, where none has to be seen beside another."""

_NAMES = pa.dictionary(pa.int32(), pa.string())
INDEX = pa.schema(
    [
        ("path", pa.large_string()),
        ("class_name", _NAMES),
        ("label", pa.int32()),
        ("split", _NAMES),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("digest", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("offset", pa.int64()),
        ("part", pa.int8()),
    ]
)
"""One row an image, sorted by part and path, whatever order the file system lists them in.

``path`` is relative, with ``/``; ``label`` numbers the classes, -1 without one; ``size`` is in bytes; ``digest`` is
BLAKE2b of the content, and ``width`` and ``height`` are upright pixels: the three are null where the images have not
been read; ``offset`` is where the image begins in a file that holds several; ``part`` is 0 for the data folder and 1
for the folder of additional images.
"""


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """The table, with what is read from it most; or some rows of one, without a copy.

    Args:
        whole: a table of schema `INDEX`.
        rows: numbers of the rows that are meant; None means all.
    """

    whole: pa.Table
    rows: npt.NDArray[np.unsignedinteger[Any]] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self.whole.num_rows) if self.rows is None else len(self.rows)

    @property
    def table(self) -> pa.Table:
        """The rows as a table of their own: a copy, where they are not all."""
        return self._select(self.whole.column_names)

    def column(self, name: str) -> pa.Array:
        """Return a column as one array: a copy, where the rows are not all."""
        return column(self._select([name]), name)

    def by_row(self, whole: Any) -> Any:
        """Return what is known by row of the whole table by row of this index, without a copy."""
        return whole if self.rows is None else Picked(whole, self.rows)

    @property
    def paths(self) -> list[str]:
        """Relative paths as a list, for a few images; a million are better left in the table."""
        return self.column("path").to_pylist()  # type: ignore[no-any-return]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each image as an integer, -1 without one."""
        return self.column("label").to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    @property
    def verified(self) -> bool:
        """Whether all images have been read and decoded."""
        return bool(self.column("digest").null_count == 0)

    def split(self, name: str) -> "ImageIndex":
        """Return the rows of one split, found once."""
        if name not in self._splits:
            splits = self.column("split")
            code = pc.index(splits.dictionary, name).as_py()  # -1 where no image is in such a split
            self._splits[name] = self.take(np.flatnonzero(splits.indices.to_numpy() == code))
        return self._splits[name]

    @cached_property
    def _splits(self) -> "dict[str, ImageIndex]":
        return {}

    def labelled(self) -> "ImageIndex":
        """Return the rows of images that have a class; itself where all have."""
        has_class = pc.greater_equal(self.column("label"), 0)
        if pc.all(has_class, min_count=0).as_py():
            return self
        return self.take(np.flatnonzero(has_class.to_numpy(zero_copy_only=False)))

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> "ImageIndex":
        """Return some rows."""
        numbers = np.uint32 if len(self.whole) <= 2**32 else np.uint64
        return ImageIndex(self.whole, (rows if self.rows is None else self.rows[rows]).astype(numbers))

    def _select(self, names: list[str]) -> pa.Table:
        columns = self.whole.select(names)
        return columns if self.rows is None else columns.take(pa.array(self.rows)).combine_chunks()

    def _shares(self, names: list[str]) -> Iterator[pa.Table]:
        """Yield some columns piece by piece."""
        columns = self.whole.select(names)
        if self.rows is None:
            yield from pieces(columns, _SHARE)
        else:
            yield from (columns.take(pa.array(rows)) for rows in pieces(self.rows, _SHARE))

    @property
    def digest(self) -> str:
        """Digest of paths and contents: 32 hexadecimal digits, independent of place, order and time.

        Of images that have not been read, size and time of change stand for the content.
        """
        hasher = hashlib.blake2b(digest_size=16)
        for share in self._shares(["path", "size", "mtime_ns", "digest"]):
            stamps = pc.binary_join_element_wise(
                pc.cast(share["size"], pa.string()), pc.cast(share["mtime_ns"], pa.string()), "@"
            )
            contents = pc.cast(pc.coalesce(share["digest"], stamps), pa.large_string())
            lines = pc.binary_join_element_wise(share["path"], contents, pa.scalar("\0", pa.large_string()))
            hasher.update("\n".join([*lines.to_pylist(), ""]).encode())
        return hasher.hexdigest()

    def write_parquet(self, path: Path) -> None:
        """Write the whole table."""
        pq.write_table(self.table, path, compression="zstd")

    def write_csv(self, path: Path) -> None:
        """Write path, class and split of each image as text, which needs no library to be read."""
        shown = pa.schema([(name, pa.string()) for name in ("path", "class_name", "label", "split")])
        shown = shown.set(2, INDEX.field("label"))
        with csv.CSVWriter(path, shown) as writer:
            for share in self._shares(shown.names):
                writer.write_table(share.cast(shown))

    def __getstate__(self) -> dict[str, Any]:
        """Return the table as compressed Parquet: a million rows in some 20 MB."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table, sink, compression="zstd")
        return {"parquet": sink.getvalue().to_pybytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the table back."""
        table = pq.read_table(pa.BufferReader(state["parquet"])).cast(INDEX).combine_chunks()
        object.__setattr__(self, "whole", table)


def make_index(
    contents: pa.Table, *, labels: dict[str, int], splits: npt.NDArray[np.int8], part: int = 0
) -> ImageIndex:
    """Put together what is known of the images that are in a split.

    Args:
        contents: what a scan has found, with the columns of `read_contents`.
        labels: class name to label.
        splits: of each image, as a number of `SPLITS`; -1 leaves it out.
        part: which part of the data set they are.
    """
    kept = splits >= 0
    contents = keep(contents, kept)
    numbers, names = codes(column(contents, "class_name"))
    label_of = np.array([labels.get(name, UNLABELLED) for name in names], dtype=np.int32)
    split = pa.DictionaryArray.from_arrays(pa.array(splits[kept].astype(np.int32)), pa.array(SPLITS, pa.string()))
    added = {
        "label": pa.array(label_of[numbers] if len(names) else np.empty(0, dtype=np.int32)),
        "split": split,
        "part": pa.array(np.full(len(contents), part, dtype=np.int8)),
    }
    columns = {name: added.get(name, contents[name] if name in contents.column_names else None) for name in INDEX.names}
    return ImageIndex(pa.table(columns).cast(INDEX).combine_chunks())


def index_folder(root: Path) -> tuple[ImageIndex, list[BadImage]]:
    """Index a whole folder, in the splits that its folders name and no others.

    Args:
        root: as `FolderSource` takes it.

    Returns:
        The good images, with an empty split where no folder names one; and the bad ones.

    Raises:
        InputError: as `FolderSource.scan`, and if no image can be decoded.
    """
    source = FolderSource(root)
    found = source.scan()
    contents, broken = read_contents(source, found.table)
    bad = [*found.bad, *broken]
    if not len(contents):
        raise InputError(f"path holds {len(bad)} images and none can be decoded: {root}")
    names = sorted(set(pc.unique(column(contents, "class_name")).to_pylist()) - {""})
    index = make_index(
        contents,
        labels={name: label for label, name in enumerate(names)},
        splits=np.zeros(len(contents), dtype=np.int8),
    )
    splits = encode(column(contents, "split"))
    at = index.table.schema.get_field_index("split")
    return ImageIndex(index.table.set_column(at, INDEX.field("split"), splits).cast(INDEX)), bad


def leaks(index: ImageIndex) -> int:
    """Return how many images of validation and test have the very content of a training image."""
    if not index.verified:
        return 0
    train = pc.equal(decoded(index.table["split"]), "train")
    digests = index.table["digest"]
    others = digests.filter(pc.invert(train))
    return int(pc.sum(pc.is_in(others, value_set=column(index.table.filter(train), "digest"))).as_py() or 0)


def concat_indexes(index: ImageIndex, more: ImageIndex) -> ImageIndex:
    """Return the rows of both."""
    return ImageIndex(pa.concat_tables([index.table, more.table]).unify_dictionaries().combine_chunks())


def without_copies(more: ImageIndex, index: ImageIndex) -> ImageIndex:
    """Return the images of ``more`` whose content no image of ``index`` has, as far as contents are known."""
    known = column(index.table, "digest").drop_null()
    copies = pc.is_in(more.table["digest"], value_set=known)
    return ImageIndex(more.table.filter(pc.invert(pc.and_(copies, pc.is_valid(more.table["digest"])))).combine_chunks())
