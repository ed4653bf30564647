"""Data sets that Hugging Face's ``datasets`` has written with ``save_to_disk``."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_ssl.datasets.sources.base import FOUND, Found, Source
from mlflow_ssl.datasets.splits import SPLITS
from mlflow_ssl.datasets.tables import column, concat, constant, encode, sort_by_path
from mlflow_ssl.errors import InputError

SPLIT_NAMES = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}


class HuggingFaceSource(Source):
    """Images of a saved ``Dataset``, or of the splits of a ``DatasetDict``.

    The images are the one column of the feature ``Image``, the class that of the feature ``ClassLabel``. The path of an
    image is its split and its row: ``train/00000123``. Only the bytes in the data set's own Arrow files are read, never
    a file that it points to.

    Args:
        root: the folder.
        labels: ``folders``: images have the class of the column; ``none``: no image has one.

    Raises:
        InputError: if ``datasets`` is not installed, or the folder is not such a data set.
    """

    def __init__(self, root: Path, *, labels: str = "folders") -> None:
        super().__init__(root)
        self.labels = labels

    def scan(self) -> Found:
        """Read classes and sizes of all rows."""
        tables = [self._scan_split(name, part) for name, part in _open(self.root).items()]
        return Found(sort_by_path(concat(tables, FOUND)), [])

    def reader(self, table: pa.Table) -> "RowReader":
        """Return a reader of the rows of a table."""
        return RowReader(self.root, column(table, "path"), table["offset"].to_numpy())

    def _scan_split(self, name: str, part: Any) -> pa.Table:
        image, label = _columns(part)
        images = part.data[image].combine_chunks() if not part._indices else None
        if images is None:  # rows in another order than they lie in
            images = part.with_format("arrow")[:][image].combine_chunks()
        count = len(part)
        stamp = max(Path(file["filename"]).stat().st_mtime_ns for file in part.cache_files)
        split = SPLIT_NAMES.get(name, "")
        columns = {
            "path": pa.array([f"{name}/{row:08d}" for row in range(count)], pa.large_string()),
            "class_name": self._class_names(part, label),
            "split": constant(split, count),
            "size": pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), 0),
            "mtime_ns": pa.array(np.full(count, stamp)),
            "ctime_ns": pa.array(np.full(count, stamp)),
            "offset": pa.array(np.arange(count)),
        }
        return pa.table({key: columns[key] for key in FOUND.names}).cast(FOUND)

    def _class_names(self, part: Any, label: str | None) -> pa.DictionaryArray:
        if label is None or self.labels == "none":
            return constant("", len(part))
        names = part.features[label].names
        numbers = part.with_format("arrow")[:][label]
        return encode(
            pa.array([names[n] if n is not None and n >= 0 else "" for n in numbers.to_pylist()], pa.string())
        )


class RowReader:
    """Bytes of images by row; each process opens the data set for itself."""

    def __init__(self, root: Path, paths: pa.Array, rows: Any) -> None:
        self._root = root
        self._paths = paths
        self._rows = rows
        self._parts: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._paths)

    def __getitem__(self, row: int) -> bytes:
        """Return the bytes of one image.

        Raises:
            OSError: if the data set does not hold them itself.
        """
        if self._parts is None:
            self._parts = {name: _without_decoding(part) for name, part in _open(self._root).items()}
        part, image = self._parts[self._paths[row].as_py().partition("/")[0]]
        data: bytes | None = part[int(self._rows[row])][image]["bytes"]
        if data is None:
            raise OSError("the data set points to a file and does not hold it; save it with the images embedded")
        return data

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open data set."""
        return self.__dict__ | {"_parts": None}


def _open(root: Path) -> dict[str, Any]:
    """Return the parts of a saved data set by name."""
    try:
        from datasets import DatasetDict, disable_progress_bars, load_from_disk
    except ImportError as error:
        raise InputError(
            f"datamodule.data_path is a data set of Hugging Face's, which needs: pip install datasets, got {root}"
        ) from error
    disable_progress_bars()
    try:
        loaded = load_from_disk(str(root))
    except (OSError, ValueError, KeyError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"datamodule.data_path cannot be read as a saved data set: {root}: {line}") from error
    if not isinstance(loaded, DatasetDict):
        return {"all": loaded}
    strange = sorted(set(loaded) - SPLIT_NAMES.keys())
    if strange:
        raise InputError(
            f"datamodule.data_path must have only the splits {', '.join(SPLITS)}, got {strange[0]!r} in {root}"
        )
    return dict(loaded)


def _columns(part: Any) -> tuple[str, str | None]:
    """Return the name of the column of images, and of that of classes.

    Raises:
        InputError: if there is not one of the first.
    """
    from datasets import ClassLabel, Image

    images = [name for name, feature in part.features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in part.features.items() if isinstance(feature, ClassLabel)]
    if len(images) != 1:
        raise InputError(f"datamodule.data_path must have one column of images, has {', '.join(images) or 'none'}")
    return images[0], labels[0] if len(labels) == 1 else None


def _without_decoding(part: Any) -> tuple[Any, str]:
    from datasets import Image

    image, _ = _columns(part)
    return part.cast_column(image, Image(decode=False)), image
