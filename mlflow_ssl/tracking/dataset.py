"""A folder of images as an MLflow data set: ``mlflow.data.from_image_folder(path)``.

``import mlflow`` itself imports this module, by its entry points: nothing heavy may be imported at its top, and
annotations are not postponed, since MLflow looks for a class in the constructor's.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource

from mlflow_ssl.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from mlflow.types import Schema

    from mlflow_ssl.datasets.index import ImageIndex

LISTED_CLASSES = 1000
"""Classes that a profile counts one by one, the largest first; MLflow takes no more than 16 MB."""


class ImageFolderSource(DatasetSource):
    """Where a folder of images is.

    Args:
        path: a local folder, or its ``file`` URI; a user and password in it are dropped.

    Raises:
        InputError: if the path is a URI of another kind.
    """

    def __init__(self, path: str) -> None:
        self._uri = _absolute(path)

    @property
    def uri(self) -> str:
        """The absolute path of the folder, or the ``file`` URI of one on another host."""
        return self._uri

    @staticmethod
    def _get_source_type() -> str:
        return "image_folder"

    def load(self) -> str:
        """Return the path of the folder.

        Raises:
            InputError: if it is not here, or not any more.
        """
        if not Path(self.uri).is_dir():
            raise InputError(f"path must be an existing folder, got {self.uri}; it may have moved, or be elsewhere")
        return self.uri

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        """Claim nothing: MLflow would take every path that is given to any data set for a folder of images."""
        return False

    @classmethod
    def _resolve(cls, raw_source: Any) -> "ImageFolderSource":
        return cls(raw_source)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes."""
        return {"uri": self.uri}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> "ImageFolderSource":
        """Return the source that a dictionary describes."""
        return cls(source_dict["uri"])


class ImageFolderDataset(Dataset):
    """The images of a folder, or of one of its splits.

    Args:
        index: the images.
        source: where they are.
        name: by default that of the folder.
        digest: by default the index's, at most 36 characters.
        num_bad_images: files that are left out since they cannot be decoded, where this is known.
    """

    def __init__(
        self,
        index: "ImageIndex",
        *,
        source: ImageFolderSource,
        name: str | None = None,
        digest: str | None = None,
        num_bad_images: int | None = None,
    ) -> None:
        self.index = index
        self.num_bad_images = num_bad_images
        self.path = source.uri
        # Dataset's own constructor computes the digest and must come last
        super().__init__(source, name=name or Path(self.path).name or None, digest=digest)

    def _compute_digest(self) -> str:
        return self.index.digest

    @property
    def schema(self) -> "Schema":
        """One row: the bytes of an image file and, where there are classes, the name of its class."""
        from mlflow.types import ColSpec, DataType, Schema

        image, label = ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "label")
        return Schema([image, label] if any(self._counts("class_name")) else [image])

    @property
    def profile(self) -> dict[str, Any]:
        """Counts, bytes and sizes in pixels, as JSON takes them."""
        classes = self._counts("class_name")
        facts = {
            "path": self.path,  # MLflow's UI shows no source of a type of our own
            "num_images": len(self.index),
            "num_classes": len(classes),
            "splits": self._counts("split"),
            "total_bytes": int(self.index.column("size").to_numpy().sum()),
            "width": _spread(self.index.column("width")),
            "height": _spread(self.index.column("height")),
            "digest_of": "contents" if self.index.verified else "sizes and times",
            "num_bad_images": self.num_bad_images,
            "classes": dict(Counter(classes).most_common(LISTED_CLASSES)),
        }
        return {name: fact for name, fact in facts.items() if fact not in (None, {})}

    def _counts(self, column: str) -> dict[str, int]:
        """Return how many images each class or split has; images with none are not counted."""
        counts = self.index.column(column).value_counts().to_pylist()
        return {row["values"]: row["counts"] for row in counts if row["values"]}

    def to_dict(self) -> dict[str, str]:
        """Return the fields of MLflow's entity, each as a string."""
        # under this key the UI lists the columns; under that of tensors it only says that there is an array
        schema = json.dumps({"mlflow_colspec": self.schema.to_dict()})
        return super().to_dict() | {"schema": schema, "profile": json.dumps(self.profile)}


def from_image_folder(path: str, name: str | None = None, digest: str | None = None) -> ImageFolderDataset:
    """Describe a folder of images, in the splits that its folders name.

    Every file that is new or has changed since it was last looked at is read and decoded; files that cannot be are
    left out and counted.

    Args:
        path: folder of class folders, of split folders that hold class folders, or of images.
        name: by default that of the folder.
        digest: by default that of relative paths and contents; a training on all images has it as tag ``data.digest``.

    Raises:
        InputError: if there is no such folder, or no image in it, or a test folder beside class folders.

    Example:
        .. code-block:: python

            mlflow.log_input(mlflow.data.from_image_folder("photos"), context="training")
    """
    from mlflow_ssl.datasets.index import index_folder

    source = ImageFolderSource(path)
    index, bad_images = index_folder(Path(source.load()))
    return ImageFolderDataset(index, source=source, name=name, digest=digest, num_bad_images=len(bad_images))


def split_datasets(
    index: "ImageIndex", *, root: str | os.PathLike[str], name: str | None = None
) -> dict[str, ImageFolderDataset]:
    """Return a data set for every split that has images, with the digest of its own images.

    Args:
        index: the images of all splits.
        root: the data folder.
        name: of each of them; by default that of the folder.

    Returns:
        Some of ``train``, ``val`` and ``test``, in this order: each is the context to log its data set with.
    """
    from mlflow_ssl.datasets.splits import SPLITS

    source = ImageFolderSource(os.fspath(root))
    splits = {split: index.split(split) for split in SPLITS}
    return {split: ImageFolderDataset(rows, source=source, name=name) for split, rows in splits.items() if len(rows)}


def _absolute(path: str) -> str:
    if "://" not in path or path.startswith("/"):
        return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 links stay as the user wrote them
    parts = urlsplit(path)
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme != "file":
        raise InputError(f"path must be a local folder, got {parts.scheme}://{host}{parts.path}")
    return f"file://{host}{parts.path}" if host not in ("", "localhost") else os.path.abspath(unquote(parts.path))  # noqa: PTH100


def _spread(pixels: "pa.Array") -> dict[str, int] | None:
    import pyarrow.compute as pc

    if pixels.null_count == len(pixels):  # nobody has looked
        return None
    low, median, high = pc.quantile(pixels, q=[0, 0.5, 1], interpolation="lower").to_pylist()
    return {"min": low, "median": median, "max": high}
