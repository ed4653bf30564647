"""The one table of a data set: which images there are, of which class, in which split, with which content.

Columns: ``path`` (relative, with ``/``), ``class_name``, ``label``, ``split``, ``size`` (bytes), ``digest``
(BLAKE2b of the content), ``width`` and ``height`` (pixels). Rows are sorted by path, whatever order the file system
lists them in.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from mlflow_ssl.datasets.contents import BadImage, read_contents
from mlflow_ssl.datasets.decode import EXTENSIONS
from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""First folders, in either case, that are taken for splits rather than classes where ``train`` is among them."""


@dataclass(frozen=True)
class ImageIndex:
    """The table, with what is read from it most."""

    table: pa.Table

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self.table.num_rows)

    @property
    def paths(self) -> list[str]:
        """Relative paths, sorted."""
        return self.table["path"].to_pylist()  # type: ignore[no-any-return]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each image as an integer."""
        return self.table["label"].to_numpy()  # type: ignore[no-any-return]

    def split(self, name: str) -> "ImageIndex":
        """Return the rows of one split."""
        return ImageIndex(self.table.filter(pc.equal(self.table["split"], name)).combine_chunks())

    def take(self, rows: npt.NDArray[np.int64]) -> "ImageIndex":
        """Return some rows."""
        return ImageIndex(self.table.take(pa.array(rows)).combine_chunks())

    @property
    def digest(self) -> str:
        """Digest of relative paths and contents: 32 hexadecimal digits, independent of place, order and time."""
        hasher = hashlib.blake2b(digest_size=16)
        for path, content in zip(self.paths, self.table["digest"].to_pylist(), strict=True):
            hasher.update(f"{path}\0{content}\n".encode())
        return hasher.hexdigest()

    def write_csv(self, path: Path) -> None:
        """Write the table as text, which needs no unpickling to be read."""
        csv.write_csv(self.table, path)


def scan(
    root: Path, *, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, tuple[str, str]]:
    """Find the images below ``root``.

    Args:
        root: folder of class folders of any depth, of split folders that hold class folders, or of images.
        include: keep only relative paths that contain one of these.
        exclude: leave out relative paths that contain one of these.

    Returns:
        Relative path to class name and split, sorted by path; the split is empty where no folder names it, the class
        name is empty where no folder does.

    Raises:
        InputError: if the folder is missing or holds no image, or if a test folder lies beside class folders.
    """
    if not root.is_dir():
        raise InputError(f"datamodule.data_path must be an existing folder, got {root}")
    found = sorted(_image_files(root))
    if not found:
        raise InputError(
            f"datamodule.data_path must hold images ({' '.join(sorted(EXTENSIONS))}), found none in {root}"
        )
    kept = [
        path
        for path in found
        if (include is None or any(part in path for part in include))
        and not any(part in path for part in exclude or ())
    ]
    if not kept:
        raise InputError(
            f"datamodule.include_filter={include} and exclude_filter={exclude} leave none of {len(found)} images"
        )
    _check_names(kept)
    return _name_classes(kept)


def _check_names(paths: Sequence[str]) -> None:
    for path in paths:
        if path != path.encode(errors="replace").decode():
            raise InputError(f"file names must be UTF-8, got {os.fsencode(path)!r}; rename the file")


def _image_files(root: Path) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        stat = Path(folder).stat()
        if (stat.st_dev, stat.st_ino) in seen:  # a link back to where we have been
            subfolders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = Path(folder).relative_to(root)
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:  # noqa: PTH122 a string is 10 times faster here
                yield (below / name).as_posix()


def _name_classes(paths: list[str]) -> dict[str, tuple[str, str]]:
    above = {path: list(PurePosixPath(path).parts[:-1]) for path in paths}
    first = {folders[0] for folders in above.values() if folders}
    has_splits = "train" in map(str.lower, first) and all(name.lower() in SPLIT_FOLDERS for name in first)
    if not has_splits:
        _refuse_stray_splits(first)
    named = {}
    for path, folders in above.items():
        split = SPLIT_FOLDERS[folders.pop(0).lower()] if has_splits and folders else ""
        named[path] = (folders[0] if folders else "", split)
    return _without_loose(named, with_folders={""} if has_splits else set())


def _refuse_stray_splits(first: set[str]) -> None:
    """Refuse a test folder that would be taken for a class, and so be trained on.

    ``train`` and ``valid`` are names that a class may well have.
    """
    stray = sorted(name for name in first if name.lower() in ("test", "val", "validation"))
    if stray:
        raise InputError(
            "datamodule.data_path must hold class folders, or split folders with train among them, got "
            f"{', '.join(sorted(first))}; move the classes below train/, rename {stray[0]}/, or leave it out with "
            f"datamodule.exclude_filter=[{stray[0]}/]"
        )


def _without_loose(named: dict[str, tuple[str, str]], *, with_folders: set[str]) -> dict[str, tuple[str, str]]:
    with_folders = with_folders | {split for name, split in named.values() if name}
    if "train" in with_folders:  # without a class there is no telling whether they are recognized
        with_folders |= {"val", "test"}
    loose = {path for path, (name, split) in named.items() if not name and split in with_folders}
    if loose:
        log.warning("%d images lie beside folders, in none of them, and are left out: %s ...", len(loose), min(loose))
    return {path: names for path, names in named.items() if path not in loose}


def make_index(
    contents: pa.Table, *, class_names: Mapping[str, str], labels: Mapping[str, int], splits: Mapping[str, str]
) -> ImageIndex:
    """Put together what is known of the images that are in a split.

    Args:
        contents: of these images at least, as `read_contents` returns them.
        class_names: relative path to class name, empty where there is none.
        labels: class name to label; images without a class get 0.
        splits: relative path to split, of the images to take.
    """
    paths = pa.array(sorted(splits), pa.string())
    chosen = contents.take(pc.index_in(paths, value_set=contents["path"].combine_chunks()))
    names = [class_names[path] for path in paths.to_pylist()]
    columns = {
        "path": paths,
        "class_name": pa.array(names, pa.string()),
        "label": pa.array([labels.get(name, 0) for name in names], pa.int64()),
        "split": pa.array([splits[path] for path in paths.to_pylist()], pa.string()),
    }
    measured = {name: chosen[name] for name in ("size", "digest", "width", "height")}
    return ImageIndex(pa.table(columns | measured))


def index_folder(root: Path) -> tuple[ImageIndex, list[BadImage]]:
    """Index a whole folder, in the splits that its folders name and no others.

    Args:
        root: as `scan` takes it.

    Returns:
        The good images, with an empty split where no folder names one; and the bad ones.

    Raises:
        InputError: as `scan`, and if no image can be decoded.
    """
    found = scan(root)
    contents, bad = read_contents(root, list(found))
    if not len(contents):
        raise InputError(f"path holds {len(bad)} images and none can be decoded: {root}")
    good = {path: found[path] for path in contents["path"].to_pylist()}
    names = {path: name for path, (name, _) in good.items()}
    labels = {name: label for label, name in enumerate(sorted(set(names.values()) - {""}))}
    splits = {path: split for path, (_, split) in good.items()}
    return make_index(contents, class_names=names, labels=labels, splits=splits), bad
