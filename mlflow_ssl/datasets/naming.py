"""Which class and which split an image is of, by where it lies."""

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_ssl.datasets.tables import constant, encode
from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""First folders, in either case, that are taken for splits rather than classes where ``train`` is among them."""

LABELS = ("folders", "none")


class Named(NamedTuple):
    """Class and split of each image, both empty where there is none, and which images to keep."""

    class_names: pa.DictionaryArray
    splits: pa.DictionaryArray
    kept: npt.NDArray[np.bool_]


def check_naming(labels: str, class_from: str) -> None:
    """Check how classes are to be named.

    Raises:
        InputError: if it cannot be done.
    """
    if labels not in LABELS:
        raise InputError(f"datamodule.labels must be folders or none, got {labels!r}")
    if class_from in ("first", "parent"):
        return
    try:
        groups = re.compile(class_from).groups
    except re.error as error:
        raise InputError(f"datamodule.class_from must be a regular expression: {error}, got {class_from!r}") from error
    if groups != 1:
        raise InputError(
            "datamodule.class_from must be first, parent, or a regular expression with one group, which is the class, "
            f"got {class_from!r}"
        )


def name_by_folder(paths: pa.Array, *, labels: str = "folders", class_from: str = "first") -> Named:
    """Name class and split of images.

    Args:
        paths: relative paths, sorted.
        labels: ``folders``, or ``none``: no image has a class.
        class_from: ``first``: the first folder, below one that is a split; ``parent``: the folder that the image is in;
            else a regular expression that is searched for in the path, and whose group is the class.

    Raises:
        InputError: if a test folder lies beside class folders, or the expression is found in no path.
    """
    folders = pc.dictionary_encode(pc.replace_substring_regex(paths, pattern="[^/]*$", replacement=""))
    above = [folder.split("/")[:-1] for folder in folders.dictionary.to_pylist()]
    first = {parts[0] for parts in above if parts}
    has_splits = "train" in map(str.lower, first) and all(name.lower() in SPLIT_FOLDERS for name in first)
    splits = [SPLIT_FOLDERS[parts.pop(0).lower()] if has_splits and parts else "" for parts in above]
    rows = folders.indices.to_numpy()
    split_of = _spread(splits, rows)
    if labels == "none":
        return Named(constant("", len(paths)), split_of, np.ones(len(paths), dtype=bool))
    if not has_splits:
        _refuse_stray_splits(first)
    if class_from in ("first", "parent"):
        at = 0 if class_from == "first" else -1
        class_names = _spread([parts[at] if parts else "" for parts in above], rows)
    else:
        class_names = _by_expression(paths, class_from)
    _warn_of_similar(class_names.dictionary.to_pylist())
    return Named(class_names, split_of, _kept(paths, class_names, split_of, has_splits=has_splits))


def _spread(names: Sequence[str], rows: npt.NDArray[np.int32]) -> pa.DictionaryArray:
    """Return ``names[rows]``, each name once in the dictionary."""
    short = encode(pa.array(names, pa.string()))
    return pa.DictionaryArray.from_arrays(pa.array(short.indices.to_numpy()[rows]), short.dictionary)


def _by_expression(paths: pa.Array, expression: str) -> pa.DictionaryArray:
    search = re.compile(expression).search
    numbers: dict[str, int] = {"": 0}
    found = np.zeros(len(paths), dtype=np.int32)
    for row, path in enumerate(paths):
        if (match := search(path.as_py())) is not None:
            found[row] = numbers.setdefault(match[1] or "", len(numbers))
    if not found.any():
        raise InputError(
            f"datamodule.class_from must be found in the images' paths, got {expression!r}; the first path is "
            f"{paths[0].as_py()}"
        )
    return pa.DictionaryArray.from_arrays(pa.array(found), pa.array(list(numbers), pa.string()))


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


def _warn_of_similar(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(name.lower(), name)
        if other != name:
            log.warning("two classes differ in upper and lower case only: %s and %s", other, name)


def _kept(
    paths: pa.Array, class_names: pa.DictionaryArray, splits: pa.DictionaryArray, *, has_splits: bool
) -> npt.NDArray[np.bool_]:
    """Return which images have a class, or are where no image has one."""
    named = pc.not_equal(class_names, "").to_numpy(zero_copy_only=False)
    split_of = splits.indices.to_numpy()
    all_splits = splits.dictionary.to_pylist()
    with_classes = {all_splits[code] for code in np.unique(split_of[named])}
    if has_splits:
        with_classes.add("")
    if "train" in with_classes:  # without a class there is no telling whether they are recognized
        with_classes |= {"val", "test"}
    in_such = np.isin(split_of, [code for code, split in enumerate(all_splits) if split in with_classes])
    loose: npt.NDArray[np.bool_] = ~named & in_such
    if loose.any():
        first = paths[int(np.flatnonzero(loose)[0])].as_py()
        log.warning("%d images lie beside folders, in none of them, and are left out: %s ...", loose.sum(), first)
    return ~loose
