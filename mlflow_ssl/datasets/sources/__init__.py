"""Where images come from: folders, lists, shards, saved data sets; one module each, one interface."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow_ssl.datasets.sources.base import FOUND, Found, Reader, Source
from mlflow_ssl.datasets.sources.folder import FolderSource
from mlflow_ssl.datasets.sources.listing import ENDINGS, ListSource
from mlflow_ssl.errors import InputError

__all__ = ["FOUND", "FolderSource", "Found", "ListSource", "Reader", "Source", "open_source"]


def open_source(
    data_path: str,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    labels: str = "folders",
    class_from: str = "first",
    list_columns: Mapping[str, str] | None = None,
    list_folder: str | None = None,
) -> Source:
    """Return the source that a path names, by what it looks like.

    Args:
        data_path: a folder of images; a ``.csv``, ``.tsv`` or ``.parquet`` list; ``.tar`` shards, in braces several; or
            a folder that Hugging Face's ``save_to_disk`` has written.
        include: keep only relative paths that contain one of these.
        exclude: leave out relative paths that contain one of these.
        labels: ``folders``: wherever the source names classes; ``none``: no image has a class.
        class_from: of a folder, see `mlflow_ssl.datasets.naming.name_by_folder`.
        list_columns: of a list, see `ListSource`.
        list_folder: likewise.

    Raises:
        InputError: if an option does not fit the source.
    """
    path = Path(data_path).expanduser().absolute()
    if path.suffix.lower() in ENDINGS and not path.is_dir():
        folder = Path(list_folder).expanduser().absolute() if list_folder else None
        return ListSource(path, folder=folder, columns=list_columns, labels=labels, include=include, exclude=exclude)
    if list_columns or list_folder:
        raise InputError(
            "datamodule.list_columns and list_folder are for a data_path that ends in "
            f"{', '.join(ENDINGS)}, got {data_path}"
        )
    special = _special(data_path, path, labels)
    if special is None:
        return FolderSource(path, labels=labels, class_from=class_from, include=include, exclude=exclude)
    if include is not None or exclude or class_from != "first":
        raise InputError(
            "datamodule.include_filter, exclude_filter and class_from are for folders and lists of images, got "
            f"data_path={data_path}"
        )
    return special


def _special(data_path: str, path: Path, labels: str) -> Source | None:
    """Return the source of shards or of a saved data set; None for a plain folder."""
    if data_path.endswith((".tar", ".tar.gz", ".tgz")) or (path.is_dir() and _holds_only_shards(path)):
        from mlflow_ssl.datasets.sources.shards import ShardSource

        return ShardSource(data_path, labels=labels)
    if any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        from mlflow_ssl.datasets.sources.huggingface import HuggingFaceSource

        return HuggingFaceSource(path, labels=labels)
    return None


def _holds_only_shards(folder: Path) -> bool:
    names = [name for name in os.listdir(folder) if not name.startswith(".")]  # noqa: PTH208 names are enough
    return any(name.endswith(".tar") for name in names) and all(name.endswith((".tar", ".json")) for name in names)
