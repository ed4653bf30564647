"""Who trains, who validates, who tests: pure functions over relative paths."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


def draw_splits(
    classes: Mapping[str, str],
    *,
    seed: int,
    val_size: float,
    test_size: float,
    given: Iterable[str] = (),
) -> dict[str, str]:
    """Give every image a split: stratified, and the same on every machine.

    Within a class, images are ordered by a hash of seed and path, and dealt in that order. So the draw depends on
    neither the file system nor any library's random numbers, and an image that joins the folder moves few others.

    Args:
        classes: relative path to class name, of the images to draw from.
        seed: another seed, another draw.
        val_size: share of these images that validates, in [0, 1).
        test_size: share of them that tests; the two together stay below 1.
        given: splits that are given, by file or folder; nothing is drawn into them. Where ``train`` is one, the
            images are divided between the others in the ratio of their sizes.

    Returns:
        Relative path to ``train``, ``val`` or ``test``; nothing where no split is left to draw into.

    Raises:
        InputError: if a size is out of range.
    """
    check_sizes(val_size, test_size)
    shares = _shares(val_size, test_size, set(given))
    members: dict[str, list[str]] = defaultdict(list)
    for path, name in classes.items():
        members[name].append(path)
    drawn: dict[str, str] = {}
    small = []
    for name, paths in sorted(members.items()):
        dealt = deal(paths, shares, seed=seed)
        if "train" in shares and not {split for split, share in shares.items() if share > 0} <= set(dealt.values()):
            small.append(name or "images without a class")
        drawn |= dealt
    if small:
        log.warning("classes with too few images for every split go to training whole: %s", ", ".join(small))
    return drawn


def deal(paths: Sequence[str], shares: Mapping[str, float], *, seed: int) -> dict[str, str]:
    """Deal the images of one class; where there are too few for each split to get one, all go to ``train``.

    Args:
        paths: relative paths, in any order.
        shares: split to its share; they sum to 1.
        seed: another seed, another deal.

    Returns:
        Relative path to split.
    """
    counts = _counts(len(paths), shares)
    if "train" in shares and any(count == 0 and shares[split] > 0 for split, count in counts.items()):
        return dict.fromkeys(paths, "train")
    order = iter(sorted(paths, key=lambda path: _hash(seed, path)))
    return {path: split for split, count in counts.items() for path in islice(order, count)}


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


def _counts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Round shares of ``total`` half up; the last split takes what remains."""
    counts: dict[str, int] = {}
    left = total
    for number, (split, share) in enumerate(shares.items(), start=1):
        counts[split] = left if number == len(shares) else min(left, int(total * share + 0.5))
        left -= counts[split]
    return counts


def _hash(seed: int, path: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{path}".encode(), digest_size=16).digest()


def read_split_files(
    root: Path, files: Mapping[str, Path], *, known: Mapping[str, object], filtered: bool = False
) -> dict[str, str]:
    """Read split files: one path relative to ``root`` a line.

    Args:
        root: the data folder.
        files: split to its file.
        known: the images found in the folder, by relative path.
        filtered: whether filters may have left out an image that a file names.

    Raises:
        InputError: if a file is missing, or names a path that is outside the folder, missing, not an image, or named
            twice.
    """
    fixed: dict[str, str] = {}
    for split, file in files.items():
        if not file.is_file():
            raise InputError(f"datamodule.{split}_split_file must be an existing file, got {file}")
        paths = _read_lines(file)
        if not paths:
            raise InputError(f"{split} split file names no image: {file}")
        _check_paths(root, file, paths, known, filtered=filtered)
        for path in paths:
            if path not in known:
                continue
            if fixed.setdefault(path, split) != split:
                raise InputError(f"split files must not share an image: {path} is in {fixed[path]} and in {split}")
    return fixed


def _read_lines(file: Path) -> list[str]:
    # a name in another encoding is refused as a missing file, with the line that it is in
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [line.strip().removeprefix("./") for line in lines if line.strip()]


def _check_paths(root: Path, file: Path, paths: Sequence[str], known: Mapping[str, object], *, filtered: bool) -> None:
    for path in paths:
        if path in known:
            continue
        target = root / path
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise InputError(f"{file.name} names a file outside the data folder: {path}; give paths relative to {root}")
        if not target.is_file():
            raise InputError(f"{file.name} names a missing file: {path}; looked in {root}")
        if not filtered:
            raise InputError(f"{file.name} names a file that is not an image of the data set: {path}")
