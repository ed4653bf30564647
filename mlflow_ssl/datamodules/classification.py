"""A folder of class folders as splits of images."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from mlflow_ssl.datasets import EpochSampler, ImageDataset
from mlflow_ssl.datasets.contents import BadImage, read_contents
from mlflow_ssl.datasets.embedded import DIGITS, digits_folder
from mlflow_ssl.datasets.index import ImageIndex, make_index, scan
from mlflow_ssl.datasets.splits import SPLITS, check_sizes, draw_splits, read_split_files
from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)


class ClassificationDataModule(LightningDataModule):
    """Images by class, divided into training, validation and test.

    Splits come, in this order, from split files, from folders named ``train``, ``val`` and ``test`` that hold the class
    folders, and from a stratified draw of what is left: of folder ``train`` where there is one, never of ``val`` or
    ``test``. A ``train.txt``, ``val.txt`` or ``test.txt`` in the data folder is that split's file unless another is
    given.

    Args:
        data_path: the data folder, or ``embedded:digits``.
        exclude_filter: leave out images whose relative path contains one of these.
        include_filter: keep only images whose relative path contains one of these.
        seed: of splits, order and views.
        num_workers: loader processes; at most as many as this machine has processors are started. 0 loads in the
            main process. Results do not depend on it.
        batch_size: images per batch and device.
        train_transform: albumentations transform of training images.
        val_transform: likewise, of validation images.
        test_transform: likewise, of test images.
        train_split_file: file with one path relative to ``data_path`` a line.
        val_split_file: likewise.
        test_split_file: likewise.
        val_size: share of the images left to draw from that validates, in [0, 1).
        test_size: share of them that tests, in [0, 1).
        class_to_idx: class name to label; by default the sorted names count from 0.
        on_bad_image: ``error`` ends the run at an image that cannot be decoded, ``skip`` leaves it out.

    Raises:
        InputError: at `build_index`, for whatever is wrong with folder, files or sizes.
    """

    def __init__(
        self,
        data_path: str,
        *,
        exclude_filter: Sequence[str] | None = None,
        include_filter: Sequence[str] | None = None,
        seed: int = 42,
        num_workers: int = 8,
        batch_size: int = 16,
        train_transform: Any = None,
        val_transform: Any = None,
        test_transform: Any = None,
        train_split_file: str | None = None,
        val_split_file: str | None = None,
        test_split_file: str | None = None,
        val_size: float = 0.2,
        test_size: float = 0.2,
        class_to_idx: Mapping[str, int] | None = None,
        on_bad_image: str = "error",
    ) -> None:
        super().__init__()
        self.data_path = data_path
        self.exclude_filter = _strings(exclude_filter)
        self.include_filter = _strings(include_filter)
        self.seed = seed
        self.num_workers = num_workers
        self.batch_size = batch_size
        self.train_transform = train_transform
        self.val_transform = val_transform
        self.test_transform = test_transform
        self.split_files = {"train": train_split_file, "val": val_split_file, "test": test_split_file}
        self.val_size = val_size
        self.test_size = test_size
        self.class_to_idx = dict(class_to_idx) if class_to_idx is not None else None
        self.on_bad_image = on_bad_image
        self.bad_images: list[BadImage] = []
        self._index: ImageIndex | None = None
        self._datasets: dict[str, Dataset[Any]] = {}
        self._position = (0, 0)

    # the table of images

    @property
    def root(self) -> Path:
        """The data folder; set ``data_path`` to move a loaded datamodule to another machine."""
        return digits_folder() if self.data_path == DIGITS else Path(self.data_path).expanduser()

    @property
    def index(self) -> ImageIndex:
        """Every image that is in a split, with its class, split and digest."""
        if self._index is None:
            self._index = self.build_index()
        return self._index

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by label; empty where the images have none."""
        mapping = self.class_to_idx or {}
        return sorted(mapping, key=mapping.__getitem__)

    def build_index(self) -> ImageIndex:
        """Scan the folder, read every image that is new or has changed, and draw the splits."""
        self._check_choices()
        root = self.root
        found = scan(root, include=self.include_filter, exclude=self.exclude_filter)
        files = self._find_split_files(root)
        filtered = self.include_filter is not None or self.exclude_filter is not None
        listed = read_split_files(root, files, known=found, filtered=filtered)
        contents, self.bad_images = read_contents(root, list(found))  # last, since it takes longest
        self._judge_bad_images(len(found))
        good = {path: found[path] for path in contents["path"].to_pylist()}
        splits = self._split(good, listed, given=set(files))
        if "train" not in splits.values():
            raise InputError("the training split is empty; check datamodule.train_split_file, val_size and test_size")
        if len(splits) < len(good):
            log.info("%d of %d images are in no split", len(good) - len(splits), len(good))
        names = {path: name for path, (name, _) in good.items()}
        self.class_to_idx = self._number_classes({names[path] for path in splits})
        return make_index(contents, class_names=names, labels=self.class_to_idx, splits=splits)

    def _check_choices(self) -> None:
        if self.on_bad_image not in ("error", "skip"):
            raise InputError(f"datamodule.on_bad_image must be error or skip, got {self.on_bad_image!r}")
        if self.batch_size < 2:
            raise InputError(f"datamodule.batch_size must be at least 2, got {self.batch_size}")
        if self.num_workers < 0:
            raise InputError(f"datamodule.num_workers must be 0 or more, got {self.num_workers}")
        check_sizes(self.val_size, self.test_size)

    def _judge_bad_images(self, num_images: int) -> None:
        if len(self.bad_images) == num_images:
            raise InputError(f"datamodule.data_path holds {num_images} images and none can be decoded: {self.root}")
        if not self.bad_images:
            return
        first = self.bad_images[0]
        if self.on_bad_image == "error":
            raise InputError(
                f"{len(self.bad_images)} of {num_images} images cannot be decoded, the first is "
                f"{self.root / first.path} ({first.reason}); mend or remove them, or set datamodule.on_bad_image=skip"
            )
        log.warning(
            "skipping %d of %d images, which cannot be decoded: %s ...", len(self.bad_images), num_images, first.path
        )

    def _split(
        self, found: Mapping[str, tuple[str, str]], listed: Mapping[str, str], *, given: set[str]
    ) -> dict[str, str]:
        fixed = {path: split for path, split in listed.items() if path in found}
        # a val or test folder is kept for its purpose: where a file names that split instead, the rest is in none
        kept = {path: split for path, (_, split) in found.items() if split in ("val", "test") and path not in fixed}
        fixed |= {path: split for path, split in kept.items() if split not in given}
        drawn = draw_splits(
            {path: name for path, (name, _) in found.items() if path not in fixed and path not in kept},
            seed=self.seed,
            val_size=self.val_size,
            test_size=self.test_size,
            given={*given, *kept.values()},
        )
        return fixed | drawn

    def _find_split_files(self, root: Path) -> dict[str, Path]:
        given = {split: Path(file).expanduser() for split, file in self.split_files.items() if file is not None}
        # a relative split file may lie in the data folder, as the tutorial's do
        given = {
            split: root / file if not file.is_file() and (root / file).is_file() else file
            for split, file in given.items()
        }
        lying = {split: root / f"{split}.txt" for split in SPLITS if (root / f"{split}.txt").is_file()}
        if lying.keys() - given.keys():
            log.info("taking splits from files in the data folder: %s", ", ".join(sorted(lying.keys() - given.keys())))
        return lying | given

    def _number_classes(self, names: set[str]) -> dict[str, int]:
        names = names - {""}
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
        return self.class_to_idx

    # Lightning's side

    def prepare_data(self) -> None:
        """Build the index unless it is there."""
        _ = self.index

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets of all splits."""
        transforms = {"train": self.train_transform, "val": self.val_transform, "test": self.test_transform}
        self._datasets = {
            split: self._image_dataset(self.index.split(split), transform) for split, transform in transforms.items()
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of training images in an order drawn anew each epoch."""
        return self._train_loader(self._datasets["train"])

    def val_dataloader(self) -> Any:
        """Return batches of validation images, or nothing where there are none."""
        return self._eval_loader("val")

    def test_dataloader(self) -> Any:
        """Return batches of test images, or nothing where there are none."""
        return self._eval_loader("test")

    def _image_dataset(self, index: ImageIndex, transform: Any) -> ImageDataset:
        return ImageDataset(self.root, index, transform=transform, seed=self.seed)

    def _eval_loader(self, split: str) -> Any:
        dataset: Any = self._datasets[split]
        return self._loader(dataset) if len(dataset) else []

    def _train_loader(self, dataset: Any) -> DataLoader[Any]:
        rank, world_size = _rank_and_world_size()
        sampler = EpochSampler(len(dataset), seed=self.seed, rank=rank, world_size=world_size, start=self._position)
        if len(sampler) < self.batch_size:
            raise InputError(
                f"datamodule.batch_size must be at most the training split's {len(sampler)} images, "
                f"got {self.batch_size}"
            )
        # BatchNorm cannot normalize a batch of one image
        drop_last = len(sampler) % self.batch_size == 1
        return self._loader(dataset, sampler=sampler, drop_last=drop_last, persistent=True)

    def _loader(self, dataset: Any, *, persistent: bool = False, **kwargs: Any) -> DataLoader[Any]:
        workers = min(
            self.num_workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            pin_memory=torch.cuda.is_available(),
            # its own: without workers a loader takes a number of the shared one every epoch, with them only once
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )

    # what a checkpoint holds

    def state_dict(self) -> dict[str, int]:
        """Return how far the training is in its data: the epoch, and its images that all processes have seen."""
        trainer = self.trainer
        assert trainer is not None
        epochs: Any = trainer.fit_loop.epoch_progress.current
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        seen = batches.completed if epochs.started > epochs.processed else 0
        return {"epoch": epochs.processed, "images": seen * self.batch_size * trainer.world_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on there."""
        # Lightning looks for that in the loader, and finds nothing
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        together = self.batch_size * (self.trainer.world_size if self.trainer else 1)
        self._position = (state_dict["epoch"], state_dict["images"] // together * together)

    # what a joblib dump holds

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a training: its trainer, and data sets with absolute paths."""
        return self.__dict__ | {"trainer": None, "_datasets": {}, "_position": (0, 0)}


def _strings(words: Sequence[str] | str | None) -> list[str] | None:
    return [words] if isinstance(words, str) else list(words) if words is not None else None


def _rank_and_world_size() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
