"""Who trains, who validates, who tests: pure functions over relative paths.

A split is a number here, an index into `SPLITS`; -1 is none.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_ssl.datasets.tables import codes, pieces
from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")

Splits = npt.NDArray[np.int8]

_TRAIN = SPLITS.index("train")


def draw_splits(
    paths: pa.Array,
    class_names: pa.DictionaryArray,
    *,
    seed: int,
    val_size: float,
    test_size: float,
    given: Iterable[str] = (),
) -> Splits:
    """Give every image a split: stratified, and the same on every machine.

    Within a class, images are ordered by a hash of seed and path, and dealt in that order. So the draw depends on
    neither the file system nor any library's random numbers, and an image that joins the folder moves few others.

    Args:
        paths: relative paths of the images to draw from, shape ``(N,)``.
        class_names: of each.
        seed: another seed, another draw.
        val_size: share of these images that validates, in [0, 1).
        test_size: share of them that tests; the two together stay below 1.
        given: splits that are given, by file or folder; nothing is drawn into them. Where ``train`` is one, the
            images are divided between the others in the ratio of their sizes.

    Returns:
        The split of each, shape ``(N,)``; -1 where no split is left to draw into.

    Raises:
        InputError: if a size is out of range.
    """
    check_sizes(val_size, test_size)
    shares = _shares(val_size, test_size, set(given))
    numbers, names = codes(class_names)
    order = _order(paths, numbers, seed=seed)
    ends = np.cumsum(np.bincount(numbers, minlength=len(names)))
    drawn = np.full(len(paths), -1, dtype=np.int8)
    small = []
    for name, rows in zip(names, np.split(order, ends[:-1]) if names else [], strict=True):
        drawn[rows] = dealt = _deal(len(rows), shares)
        if "train" in shares and any(SPLITS.index(split) not in dealt for split, share in shares.items() if share > 0):
            small.append(name or "images without a class")
    if small:
        log.warning("classes with too few images for every split go to training whole: %s", ", ".join(small))
    return drawn


def deal(paths: pa.Array, shares: Mapping[str, float], *, seed: int) -> Splits:
    """Deal the images of one class; where there are too few for each split to get one, all go to ``train``.

    Args:
        paths: relative paths, in any order, shape ``(N,)``.
        shares: split to its share; they sum to 1.
        seed: another seed, another deal.

    Returns:
        The split of each, shape ``(N,)``.
    """
    dealt = np.empty(len(paths), dtype=np.int8)
    dealt[_order(paths, np.zeros(len(paths), dtype=np.int64), seed=seed)] = _deal(len(paths), shares)
    return dealt


def sample(paths: pa.Array, labels: npt.NDArray[np.int64], count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Choose some of the images: of each class its share of them, to within one image.

    Args:
        paths: relative paths, in any order, shape ``(N,)``.
        labels: class of each, shape ``(N,)``.
        count: how many, in 1..N.
        seed: another seed, another choice; within a class it is made as in `draw_splits`.

    Returns:
        Rows of the chosen, ascending, shape ``(count,)``.
    """
    by_class = _order(paths, labels, seed=seed)
    middles = (2 * np.arange(count) + 1) * len(paths) // (2 * count)
    return np.sort(by_class[middles])


def check_sizes(val_size: float, test_size: float) -> None:
    """Refuse shares that are out of range, or that leave nothing to train on.

    Raises:
        InputError: naming them.
    """
    for name, size in (("val_size", val_size), ("test_size", test_size)):
        if not 0 <= size < 1:
            raise InputError(f"datamodule.{name} must be in [0, 1), got {size}")
    if val_size + test_size >= 1:
        raise InputError(f"datamodule.val_size + test_size must leave images to train on, got {val_size} + {test_size}")


def _shares(val_size: float, test_size: float, given: set[str]) -> dict[str, float]:
    """Return the share of the images that each open split gets; they sum to 1, or there is none."""
    shares = {split: share for split, share in (("test", test_size), ("val", val_size)) if split not in given}
    total = sum(shares.values())
    if "train" not in given:
        return shares | {"train": 1 - total}
    return {split: share / total for split, share in shares.items()} if total > 0 else {}


def _deal(total: int, shares: Mapping[str, float]) -> Splits:
    """Return the splits of ``total`` images in their order."""
    if not shares:
        return np.full(total, -1, dtype=np.int8)
    counts = _counts(total, shares)
    if "train" in shares and any(count == 0 and shares[split] > 0 for split, count in counts.items()):
        return np.full(total, _TRAIN, dtype=np.int8)
    return np.repeat(np.array([SPLITS.index(split) for split in counts], dtype=np.int8), list(counts.values()))


def _counts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Round shares of ``total`` half up; the last split takes what remains."""
    counts: dict[str, int] = {}
    left = total
    for number, (split, share) in enumerate(shares.items(), start=1):
        counts[split] = left if number == len(shares) else min(left, int(total * share + 0.5))
        left -= counts[split]
    return counts


def _order(paths: pa.Array, classes: npt.NDArray[np.int64], *, seed: int) -> npt.NDArray[np.int64]:
    """Return the rows sorted by class, and within one by the hash of seed and path."""
    hashes = np.empty(len(paths), dtype=np.uint64)
    start = 0
    for share in pieces(paths, 8192):
        digests = b"".join(_hash(seed, path) for path in share.to_pylist())
        hashes[start : start + len(share)] = np.frombuffer(digests, dtype=">u8")[::2]  # 64 of 128 bits tell all apart
        start += len(share)
    return np.lexsort((hashes, classes))


def _hash(seed: int, path: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{path}".encode(), digest_size=16).digest()


def read_split_files(root: Path, files: Mapping[str, Path], *, known: pa.Array, filtered: bool = False) -> Splits:
    """Read split files: one path relative to ``root`` a line.

    Args:
        root: the data folder.
        files: split to its file.
        known: relative paths of the images found in the folder, shape ``(N,)``.
        filtered: whether filters may have left out an image that a file names.

    Returns:
        The split that is given to each image, shape ``(N,)``; -1 where none is.

    Raises:
        InputError: if a file is missing, or names a path that is outside the folder, missing, not an image, or named
            twice.
    """
    fixed = np.full(len(known), -1, dtype=np.int8)
    for split, file in files.items():
        if not file.is_file():
            raise InputError(f"datamodule.{split}_split_file must be an existing file, got {file}")
        paths = _read_lines(file)
        if not paths:
            raise InputError(f"{split} split file names no image: {file}")
        rows = pc.index_in(pa.array(paths, known.type), value_set=known).fill_null(-1).to_numpy()
        strange = [paths[number] for number in np.flatnonzero(rows < 0)]
        _check_paths(root, file, strange, filtered=filtered)
        rows = rows[rows >= 0]
        taken = rows[(fixed[rows] >= 0) & (fixed[rows] != SPLITS.index(split))]
        if len(taken):
            path, other = known[int(taken[0])].as_py(), SPLITS[fixed[taken[0]]]
            raise InputError(f"split files must not share an image: {path} is in {other} and in {split}")
        fixed[rows] = SPLITS.index(split)
    return fixed


def _read_lines(file: Path) -> list[str]:
    # a name in another encoding is refused as a missing file, with the line that it is in
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [line.strip().removeprefix("./") for line in lines if line.strip()]


def _check_paths(root: Path, file: Path, strange: Sequence[str], *, filtered: bool) -> None:
    """Refuse paths that are not of the data set."""
    for path in strange:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise InputError(f"{file.name} names a file outside the data folder: {path}; give paths relative to {root}")
        if not (root / path).is_file():
            raise InputError(f"{file.name} names a missing file: {path}; looked in {root}")
        if not filtered:
            raise InputError(f"{file.name} names a file that is not an image of the data set: {path}")
