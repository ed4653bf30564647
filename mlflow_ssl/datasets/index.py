"""The one table of a data set: which images there are, of which class, in which split, with which content."""

import hashlib
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
from mlflow_ssl.datasets.tables import codes, column, decoded, encode, keep, pieces
from mlflow_ssl.errors import InputError

UNLABELLED = -1
"""Label of an image without a class."""

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


@dataclass(frozen=True)
class ImageIndex:
    """The table, with what is read from it most."""

    table: pa.Table

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self.table.num_rows)

    @property
    def paths(self) -> list[str]:
        """Relative paths as a list, for a few images; a million are better left in the table."""
        return self.table["path"].to_pylist()  # type: ignore[no-any-return]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each image as an integer, -1 without one."""
        return self.table["label"].to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    @property
    def verified(self) -> bool:
        """Whether all images have been read and decoded."""
        return bool(self.table["digest"].null_count == 0)

    def split(self, name: str) -> "ImageIndex":
        """Return the rows of one split: the same each time, since a hundred million have no room for copies."""
        if name not in self._splits:
            found = self.table.filter(pc.equal(decoded(self.table["split"]), name)).combine_chunks()
            self._splits[name] = ImageIndex(found)
        return self._splits[name]

    @cached_property
    def _splits(self) -> "dict[str, ImageIndex]":
        return {}

    def labelled(self) -> "ImageIndex":
        """Return the rows of images that have a class; itself where all have."""
        has_class = pc.greater_equal(self.table["label"], 0)
        if pc.all(has_class, min_count=0).as_py():
            return self
        return ImageIndex(self.table.filter(has_class).combine_chunks())

    def take(self, rows: npt.NDArray[np.int64]) -> "ImageIndex":
        """Return some rows."""
        return ImageIndex(self.table.take(pa.array(rows)).combine_chunks())

    @property
    def digest(self) -> str:
        """Digest of paths and contents: 32 hexadecimal digits, independent of place, order and time.

        Of images that have not been read, size and time of change stand for the content.
        """
        hasher = hashlib.blake2b(digest_size=16)
        for share in pieces(self.table, 65_536):
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
        shown = self.table.select(["path", "class_name", "label", "split"])
        for name in ("class_name", "split"):
            shown = shown.set_column(shown.schema.get_field_index(name), name, decoded(shown[name]))
        csv.write_csv(shown, path)

    def __getstate__(self) -> dict[str, Any]:
        """Return the table as compressed Parquet: a million rows in some 20 MB."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table, sink, compression="zstd")
        return {"parquet": sink.getvalue().to_pybytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the table back."""
        table = pq.read_table(pa.BufferReader(state["parquet"])).cast(INDEX).combine_chunks()
        object.__setattr__(self, "table", table)


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
