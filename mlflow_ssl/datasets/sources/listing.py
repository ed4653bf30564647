"""A CSV or Parquet file that lists images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from mlflow_ssl.datasets.bad_images import BadImage
from mlflow_ssl.datasets.progress import Counting
from mlflow_ssl.datasets.side_by_side import side_by_side_if_slow
from mlflow_ssl.datasets.sources.base import FOUND, Found, Source
from mlflow_ssl.datasets.sources.folder import FileReader, exist, filter_paths
from mlflow_ssl.datasets.splits import SPLITS
from mlflow_ssl.datasets.tables import column, concat, encode, pieces, sort_by_path
from mlflow_ssl.datasets.walk import FILES, look
from mlflow_ssl.errors import InputError

ENDINGS = (".csv", ".tsv", ".parquet")

COLUMNS = {"path": "path", "label": "label", "split": "split"}
"""What is read of a list, and the names of its columns by default."""

_SHARE = 1000


class ListSource(Source):
    """Images that a list names, with class and split where it has such columns.

    Args:
        file: CSV (``.csv``, with a header), tab-separated (``.tsv``) or Parquet.
        folder: what the paths are relative to; by default the folder that the list is in. An absolute path has to be
            below it.
        columns: names of the columns for ``path``, ``label`` and ``split``; the last two are optional unless they are
            named here.
        include: keep only relative paths that contain one of these.
        exclude: leave out relative paths that contain one of these.
        labels: ``folders``: the column of labels names the classes; ``none``: no image has a class.
    """

    def __init__(
        self,
        file: Path,
        *,
        folder: Path | None = None,
        columns: Mapping[str, str] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        labels: str = "folders",
    ) -> None:
        super().__init__(folder or file.parent)
        self.file = file
        self.columns = dict(columns or {})
        self.include = include
        self.exclude = exclude
        self.labels = labels

    def scan(self) -> Found:
        """Read the list and look at each file.

        Raises:
            InputError: if the list cannot be read, lacks a column, or names a path outside the folder or one twice.
        """
        listed = self._read()
        files, bad = _look_at(self.root, listed)
        files = filter_paths(files, include=self.include, exclude=self.exclude)
        rows = pc.index_in(column(files, "path"), value_set=column(listed, "path"))
        offset = pa.array(np.zeros(len(files), dtype=np.int64))
        table = files.append_column("offset", offset)
        for name in ("class_name", "split"):
            table = table.append_column(name, listed[name].take(rows))
        return Found(table.select(FOUND.names).cast(FOUND), bad)

    def exist(self, paths: pa.Array) -> npt.NDArray[np.bool_]:
        """Return which images still exist."""
        return exist(self.root, paths)

    def reader(self, table: pa.Table) -> FileReader:
        """Return a reader of the rows of a table."""
        return FileReader(self.root, column(table, "path"))

    def _read(self) -> pa.Table:
        read = _read_table(self.file)
        names = COLUMNS | self.columns
        missing = [name for key, name in names.items() if name not in read.column_names and self._wants(key)]
        if missing:
            raise InputError(
                f"{self.file.name} must have a column {missing[0]!r}, has {', '.join(read.column_names)}; name its "
                "columns with datamodule.list_columns={path: ..., label: ..., split: ...}"
            )
        paths = _relative(pc.cast(read[names["path"]].combine_chunks(), pa.large_string()), self.root, self.file)
        has_label = names["label"] in read.column_names and self.labels != "none"
        table = pa.table(
            {
                "path": paths,
                "class_name": _names(read[names["label"]] if has_label else None, len(read)),
                "split": _names(read[names["split"]] if names["split"] in read.column_names else None, len(read)),
            }
        )
        _check(table, self.file)
        return sort_by_path(table)

    def _wants(self, key: str) -> bool:
        return key == "path" or key in self.columns


def _read_table(file: Path) -> pa.Table:
    if not file.is_file():
        raise InputError(f"datamodule.data_path must be an existing file, got {file}")
    try:
        if file.suffix == ".parquet":
            return pq.read_table(file)
        tabs = file.suffix == ".tsv"
        return csv.read_csv(
            file,
            parse_options=csv.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(_header(file), pa.string())),
        )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"datamodule.data_path cannot be read as a list: {file}: {_first_line(error)}") from error


def _header(file: Path) -> list[str]:
    """Return the names of the columns, so that all are read as text: a class ``007`` is not the number 7."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        line = lines.readline().rstrip("\r\n")
    return [name.strip('"') for name in line.split("\t" if file.suffix == ".tsv" else ",")]


def _names(values: Any, length: int) -> pa.DictionaryArray:
    if values is None:
        return encode(pa.array([""] * length, pa.string()))
    return encode(pc.fill_null(pc.cast(values.combine_chunks(), pa.string()), ""))


def _relative(paths: pa.Array, root: Path, file: Path) -> pa.Array:
    paths = pc.fill_null(paths, "")
    above = f"{root}/"
    inside = pc.starts_with(paths, above)
    paths = pc.if_else(inside, pc.utf8_slice_codeunits(paths, start=len(above)), paths)
    paths = pc.replace_substring_regex(paths, pattern=r"^(\./)+", replacement="")
    outside = pc.match_substring_regex(paths, r"^$|^/|(^|/)\.\.(/|$)|^[A-Za-z]:[\\/]")
    if pc.any(outside).as_py():
        row = pc.index(outside, value=True).as_py()
        raise InputError(
            f"{file.name} must name files below {root}, got {paths[row].as_py()!r} in row {row + 1}; set the folder "
            "with datamodule.list_folder"
        )
    return paths


def _check(table: pa.Table, file: Path) -> None:
    counts = table["path"].value_counts()
    twice = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    if len(twice):
        raise InputError(f"{file.name} must name each image once, got {twice[0].as_py()['values']} more than once")
    splits = set(pc.unique(table["split"]).to_pylist())
    if strange := sorted(splits - {"", *SPLITS}):
        raise InputError(f"{file.name} must have only the splits {', '.join(SPLITS)} or none, got {strange[0]!r}")


def _look_at(root: Path, listed: pa.Table) -> tuple[pa.Table, list[BadImage]]:
    bad: list[BadImage] = []
    tables = []
    paths = column(listed, "path")
    with Counting("looking at", "files", len(paths)) as counting:
        shares = pieces(paths, _SHARE)
        for table, strange in side_by_side_if_slow(
            lambda share: look(str(root), "", share.to_pylist()), shares, slow_seconds=0.1
        ):
            tables.append(table)
            bad.extend(strange)
            counting.advance(_SHARE)
    return concat(tables, FILES), bad


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
