"""A folder of image files, by class or without any."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_ssl.datasets.decode import EXTENSIONS
from mlflow_ssl.datasets.naming import name_by_folder
from mlflow_ssl.datasets.sources.base import FOUND, Found, Source
from mlflow_ssl.datasets.tables import column, keep
from mlflow_ssl.datasets.walk import find_images
from mlflow_ssl.errors import InputError


class FolderSource(Source):
    """Images below a folder.

    Args:
        root: folder of class folders of any depth, of split folders that hold class folders, or of images.
        include: keep only relative paths that contain one of these.
        exclude: leave out relative paths that contain one of these.
        labels: see `mlflow_ssl.datasets.naming.name_by_folder`.
        class_from: likewise.
        key: what the folder is called in messages.
    """

    def __init__(
        self,
        root: Path,
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        labels: str = "folders",
        class_from: str = "first",
        key: str = "datamodule.data_path",
    ) -> None:
        super().__init__(root)
        self.include = include
        self.exclude = exclude
        self.labels = labels
        self.class_from = class_from
        self.key = key

    def scan(self) -> Found:
        """Find the images; those beside class folders are left out with a warning.

        Raises:
            InputError: if the folder is missing or holds no image, or if a test folder lies beside class folders.
        """
        if not self.root.is_dir():
            raise InputError(f"{self.key} must be an existing folder, got {self.root}")
        files, bad = find_images(self.root)
        if not len(files) and not bad:
            raise InputError(f"{self.key} must hold images ({' '.join(sorted(EXTENSIONS))}), found none in {self.root}")
        files = filter_paths(files, include=self.include, exclude=self.exclude)
        bad = [image for image in bad if _passes(image.path, self.include, self.exclude)]
        if not len(files):
            return Found(FOUND.empty_table(), bad)
        named = name_by_folder(column(files, "path"), labels=self.labels, class_from=self.class_from)
        table = files.append_column("class_name", named.class_names).append_column("split", named.splits)
        table = table.append_column("offset", pa.array(np.zeros(len(files), dtype=np.int64)))
        return Found(keep(table.select(FOUND.names).cast(FOUND), named.kept), bad)

    def exist(self, paths: pa.Array) -> npt.NDArray[np.bool_]:
        """Return which images still exist."""
        return exist(self.root, paths)

    def reader(self, table: pa.Table) -> "FileReader":
        """Return a reader of the rows of a table."""
        return FileReader(self.root, column(table, "path"))


class FileReader:
    """Bytes of files below a folder, by row."""

    def __init__(self, root: Path, paths: pa.Array) -> None:
        self.root = root
        self._paths = paths  # Arrow, not a list: forked workers share it instead of copying it

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._paths)

    def __getitem__(self, row: int) -> bytes:
        """Return what one file holds.

        Raises:
            OSError: if it cannot be read any more.
        """
        with open(f"{self.root}/{self._paths[row].as_py()}", "rb") as file:  # noqa: PTH123 a string is faster
            return file.read()


def exist(root: Path, paths: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which files below a folder exist."""
    return np.array([os.path.exists(f"{root}/{path.as_py()}") for path in paths], dtype=bool)  # noqa: PTH110 a string is faster


def filter_paths(files: pa.Table, *, include: Sequence[str] | None, exclude: Sequence[str] | None) -> pa.Table:
    """Return the rows whose path the filters leave.

    Raises:
        InputError: if they leave none of some.
    """
    if include is None and not exclude:
        return files
    paths = column(files, "path")
    kept = np.ones(len(files), dtype=bool) if include is None else _contain_any(paths, include)
    kept &= ~_contain_any(paths, exclude or ())
    if len(files) and not kept.any():
        raise InputError(
            f"datamodule.include_filter={include} and exclude_filter={exclude} leave none of {len(files)} images"
        )
    return keep(files, kept)


def _contain_any(paths: pa.Array, parts: Sequence[str]) -> npt.NDArray[np.bool_]:
    contained = np.zeros(len(paths), dtype=bool)
    for part in parts:
        contained |= pc.match_substring(paths, part).to_numpy(zero_copy_only=False)
    return contained


def _passes(path: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    included = include is None or any(part in path for part in include)
    return included and not any(part in path for part in exclude or ())
