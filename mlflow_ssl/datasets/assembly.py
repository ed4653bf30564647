"""From sources to the one index: scan, split files, contents, splits, classes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_ssl.datasets.bad_images import BadImage
from mlflow_ssl.datasets.contents import read_contents, without_contents
from mlflow_ssl.datasets.index import ImageIndex, concat_indexes, leaks, make_index, without_copies
from mlflow_ssl.datasets.sources import Found, Source
from mlflow_ssl.datasets.splits import SPLITS, Splits, draw_splits, read_split_files
from mlflow_ssl.datasets.tables import codes, column, keep
from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

VERIFIED_BY_DEFAULT = 100_000
"""Images that ``verify=auto`` reads before a training: some minutes' worth."""

_TRAIN = SPLITS.index("train")


@dataclass
class Assembly:
    """Puts the index of a data set together.

    Args:
        source: the data.
        additional: images without classes that are trained on too; None for none.
        split_files: split to its file; a ``train.txt``, ``val.txt`` or ``test.txt`` in the data folder is taken too.
        filtered: whether filters may have left out an image that a split file names.
        seed: of the draw.
        val_size: see `mlflow_ssl.datasets.splits.draw_splits`.
        test_size: likewise.
        class_to_idx: class name to label; None numbers the sorted names.
        on_bad_image: ``error``, or anything else to leave bad images out.
        verify: ``all``, ``none`` or ``auto``.
        max_pixels: images with more are bad; None for the usual limit.

    Attributes:
        bad_images: what could not be read, after `build`.
        labels: class name to label, likewise.
    """

    source: Source
    additional: Source | None
    split_files: Mapping[str, str]
    filtered: bool
    seed: int
    val_size: float
    test_size: float
    class_to_idx: Mapping[str, int] | None
    on_bad_image: str
    verify: str
    max_pixels: int | None
    bad_images: list[BadImage] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def build(self) -> ImageIndex:
        """Scan the sources, read every image that is new or has changed, and draw the splits.

        Raises:
            InputError: for whatever is wrong with folders, files, classes or images.
        """
        found = self.source.scan()
        files = self._find_split_files()
        listed = read_split_files(self.source.root, files, known=column(found.table, "path"), filtered=self.filtered)
        more = None if self.additional is None else _outside(self.source, self.additional).scan()
        verified = self._is_verified(len(found.table) + (len(more.table) if more else 0))
        contents = self._contents(self.source, found, verified=verified)  # last, since it takes longest
        splits = self._split(contents, listed[_rows(found.table, contents)], given=set(files))
        if not (splits == _TRAIN).any() and more is None:
            raise InputError("the training split is empty; check datamodule.train_split_file, val_size and test_size")
        if (splits < 0).any():
            log.info("%d of %d images are in no split", (splits < 0).sum(), len(splits))
        self.labels = self._number_classes(keep(contents, splits >= 0))
        index = make_index(contents, labels=self.labels, splits=splits)
        if self.additional is not None and more is not None:
            index = self._with_additional(index, self._contents(self.additional, more, verified=verified))
        if number := leaks(index):
            log.warning(
                "%d images of validation and test have the very content of a training image; "
                "`python -m mlflow_ssl check-data` lists them",
                number,
            )
        return index

    # contents

    def _is_verified(self, num_images: int) -> bool:
        if self.verify == "all" or (self.verify == "auto" and num_images <= VERIFIED_BY_DEFAULT):
            return True
        log.info(
            "%d images are not read before the training: broken ones show during it, and the digest is of sizes and "
            "times; datamodule.verify=all reads them",
            num_images,
        )
        return False

    def _contents(self, source: Source, found: Found, *, verified: bool) -> pa.Table:
        """Return the readable images with what is in them, and note the others."""
        if verified:
            contents, broken = read_contents(source, found.table, max_pixels=self.max_pixels)
        else:
            contents, broken = without_contents(found.table), []
        bad = [*found.bad, *broken]
        self._judge(bad, len(found.table) + len(found.bad), source.root)
        self.bad_images += bad
        return contents

    def _judge(self, bad: Sequence[BadImage], num_images: int, root: Path) -> None:
        if not bad:
            return
        first = f"the first is {root / bad[0].path} ({bad[0].reason})"
        if len(bad) == num_images:
            raise InputError(f"datamodule.data_path holds {num_images} images and none can be read: {first}")
        if self.on_bad_image == "error":
            raise InputError(
                f"{len(bad)} of {num_images} images cannot be read, {first}; mend or remove them, or set "
                "datamodule.on_bad_image=skip"
            )
        log.warning("skipping %d of %d images, which cannot be read: %s ...", len(bad), num_images, bad[0].path)

    def _with_additional(self, index: ImageIndex, contents: pa.Table) -> ImageIndex:
        train = np.full(len(contents), _TRAIN, dtype=np.int8)
        more = make_index(contents, labels={}, splits=train, part=1)
        kept = without_copies(more, index)
        if len(kept) < len(more):
            log.info("%d images of datamodule.unlabelled_path are in the data too, and left out", len(more) - len(kept))
        return concat_indexes(index, kept)

    # splits and classes

    def _find_split_files(self) -> dict[str, Path]:
        root = self.source.root
        given = {split: Path(file).expanduser() for split, file in self.split_files.items()}
        # a relative split file may lie in the data folder, as the tutorial's do
        given = {
            split: root / file if not file.is_file() and (root / file).is_file() else file
            for split, file in given.items()
        }
        lying = {split: root / f"{split}.txt" for split in SPLITS if (root / f"{split}.txt").is_file()}
        if lying.keys() - given.keys():
            log.info("taking splits from files in the data folder: %s", ", ".join(sorted(lying.keys() - given.keys())))
        return lying | given

    def _split(self, contents: pa.Table, listed: Splits, *, given: set[str]) -> Splits:
        """Return the split of each image: as a file says, as the source says, or as drawn."""
        named = _named_splits(contents)
        # a val or test folder is kept for its purpose: where a file names that split instead, the rest is in none
        kept = (named > _TRAIN) & (listed < 0)
        open_to = [number for number, split in enumerate(SPLITS) if split not in given]
        splits = np.where(kept & np.isin(named, open_to), named, listed)
        left = (listed < 0) & ~kept
        if pc.any(pc.not_equal(column(contents, "class_name"), "")).as_py():  # the others could not be measured by
            unlabelled = left & pc.equal(column(contents, "class_name"), "").to_numpy(zero_copy_only=False)
            splits[unlabelled] = -1 if "train" in given else _TRAIN
            left &= ~unlabelled
        splits[left] = draw_splits(
            keep(column(contents, "path"), left),
            keep(column(contents, "class_name"), left),
            seed=self.seed,
            val_size=self.val_size,
            test_size=self.test_size,
            given={*given, *(SPLITS[number] for number in np.unique(named[kept]))},
        )
        return splits

    def _number_classes(self, contents: pa.Table) -> dict[str, int]:
        names = set(pc.unique(column(contents, "class_name")).to_pylist()) - {""}
        if self.class_to_idx is None:
            return {name: label for label, name in enumerate(sorted(names))}
        unknown = sorted(names - self.class_to_idx.keys())
        if unknown:
            raise InputError(
                f"datamodule.class_to_idx must name every class folder; it lacks {', '.join(unknown)} "
                "(leave them out with datamodule.exclude_filter)"
            )
        if sorted(self.class_to_idx.values()) != list(range(len(self.class_to_idx))):
            raise InputError(f"datamodule.class_to_idx must number the classes 0, 1, 2, ..., got {self.class_to_idx}")
        return dict(self.class_to_idx)


def _named_splits(contents: pa.Table) -> Splits:
    """Return the split that the source names for each image, -1 where it names none."""
    numbers, names = codes(column(contents, "split"))
    by_number = np.array([SPLITS.index(name) if name else -1 for name in names], dtype=np.int8)
    return by_number[numbers] if names else np.full(len(contents), -1, dtype=np.int8)


def _rows(table: pa.Table, contents: pa.Table) -> npt.NDArray[np.int64]:
    """Return the rows of a table that the contents are of."""
    if len(table) == len(contents):
        return np.arange(len(table))
    rows: npt.NDArray[np.int64] = pc.index_in(column(contents, "path"), value_set=column(table, "path")).to_numpy()
    return rows


def _outside(source: Source, additional: Source) -> Source:
    """Return the additional source, unless one lies in the other.

    Raises:
        InputError: if so: images to validate with would be trained on.
    """
    first, second = source.root.resolve(), additional.root.resolve()
    if first.is_relative_to(second) or second.is_relative_to(first):
        raise InputError(
            f"datamodule.unlabelled_path must be outside of the data, got {additional.root} beside {source.root}"
        )
    return additional
