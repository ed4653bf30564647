"""A folder of class folders, or another source of images, as splits of images."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from mlflow_ssl.datamodules.loading import LoadingPlan, collate, free_memory, nbytes, plan_loading, usable_cores
from mlflow_ssl.datasets import EpochSampler, ImageDataset
from mlflow_ssl.datasets.assembly import Assembly
from mlflow_ssl.datasets.bad_images import POLICIES, BadImage, BadImageList
from mlflow_ssl.datasets.decode import DecodeError
from mlflow_ssl.datasets.embedded import DIGITS, digits_folder
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.datasets.naming import check_naming
from mlflow_ssl.datasets.sampler import DealtBatches
from mlflow_ssl.datasets.sources import FolderSource, Source, open_source
from mlflow_ssl.datasets.sources.parts import open_reader
from mlflow_ssl.datasets.splits import check_sizes
from mlflow_ssl.datasets.tables import column
from mlflow_ssl.errors import InputError
from mlflow_ssl.processes import rank_and_world_size
from mlflow_ssl.transforms import apply, to_tensor

if TYPE_CHECKING:
    from mlflow_ssl.datasets.pixels import PixelCache

log = logging.getLogger(__name__)


class ClassificationDataModule(LightningDataModule):
    """Images by class, divided into training, validation and test.

    Splits come, in this order, from split files, from folders named ``train``, ``val`` and ``test`` that hold the class
    folders (or from the source, where it names splits), and from a stratified draw of what is left: of ``train`` where
    there is one, never of ``val`` or ``test``. A ``train.txt``, ``val.txt`` or ``test.txt`` in the data folder is that
    split's file unless another is given.

    Args:
        data_path: a folder, a list, shards or a saved data set, see `mlflow_ssl.datasets.sources.open_source`; or
            ``embedded:digits``.
        exclude_filter: leave out images whose relative path contains one of these.
        include_filter: keep only images whose relative path contains one of these.
        seed: of splits, order and views.
        num_workers: loader processes, at most as many as this machine has processors; ``auto`` suits the machine. 0
            loads in the main process. Results do not depend on it, but for shards.
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
        on_bad_image: ``error`` ends the run at an image that cannot be read; ``skip`` and ``replace`` leave it out, and
            where that shows during the training only, ``replace`` puts another image in its place.
        labels: ``folders``, or ``none``: no image has a class.
        class_from: ``first`` folder, ``parent`` folder, or a regular expression with one group.
        list_columns: names of the columns ``path``, ``label`` and ``split`` of a list.
        list_folder: what a list's paths are relative to; by default its own folder.
        unlabelled_path: folder of additional training images; a class means nothing in it.
        verify: ``all`` reads and decodes each new or changed image before the training, so that the broken ones and the
            digest of all contents are known; ``none`` goes by sizes and times; ``auto`` verifies up to
            100,000 images.
        max_pixels: images with more are bad; None means `mlflow_ssl.datasets.decode.MAX_PIXELS`.
        decode_at_least: pixels of the shorter side that are enough: larger JPEG files are decoded at a half, a quarter
            or an eighth of their size, but not smaller than this; None decodes at full size.
        cache: ``ram`` or ``disk`` keeps decoded images, resized to ``cache_shorter_side``, for all workers, processes
            and runs; ``none`` decodes them each time.
        cache_shorter_side: pixels.

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
        num_workers: int | str = 8,
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
        labels: str = "folders",
        class_from: str = "first",
        list_columns: Mapping[str, str] | None = None,
        list_folder: str | None = None,
        unlabelled_path: str | None = None,
        verify: str = "auto",
        max_pixels: int | None = None,
        decode_at_least: int | None = None,
        cache: str = "none",
        cache_shorter_side: int | None = None,
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
        self.labels = labels
        self.class_from = class_from
        self.list_columns = dict(list_columns) if list_columns else None
        self.list_folder = list_folder
        self.unlabelled_path = unlabelled_path
        self.verify = verify
        self.max_pixels = max_pixels
        self.decode_at_least = decode_at_least
        self.cache = cache
        self.cache_shorter_side = cache_shorter_side
        self.bad_images: list[BadImage] = []
        self.bad_image_list: BadImageList | None = None
        self._index: ImageIndex | None = None
        self._opened: tuple[str, Source] | None = None
        self._pixels: PixelCache | None = None
        self._datasets: dict[str, Dataset[Any]] = {}
        self._position = (0, 0)
        self._images_done = 0
        self._said_loading = False

    # the table of images

    @property
    def source(self) -> Source:
        """Where the images are; set ``data_path`` to move a loaded datamodule to another machine.

        It is opened once, since that may mean to look at ten thousands of shards, and anew by `build_index`.
        """
        if self._opened is None or self._opened[0] != self.data_path:
            self._opened = self.data_path, self._open_source()
        return self._opened[1]

    def _open_source(self) -> Source:
        if self.data_path == DIGITS:
            return FolderSource(digits_folder(), include=self.include_filter, exclude=self.exclude_filter)
        return open_source(
            self.data_path,
            include=self.include_filter,
            exclude=self.exclude_filter,
            labels=self.labels,
            class_from=self.class_from,
            list_columns=self.list_columns,
            list_folder=self.list_folder,
        )

    @property
    def sources(self) -> list[Source]:
        """The source of each part of the index: the data, and the additional images where there are some."""
        if self.unlabelled_path is None:
            return [self.source]
        extra = Path(self.unlabelled_path).expanduser().absolute()
        return [self.source, FolderSource(extra, labels="none", key="datamodule.unlabelled_path")]

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.source.root

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

    def images_of(self, split: str) -> ImageIndex:
        """Return the images of a split that are used, in the order that its loader numbers them in."""
        return self.index.split(split)

    def build_index(self) -> ImageIndex:
        """Scan the source, read every image that is new or has changed, and draw the splits."""
        self._opened = None
        self._check_choices()
        source, *additional = self.sources
        assembly = Assembly(
            source,
            additional[0] if additional else None,
            split_files={split: file for split, file in self.split_files.items() if file is not None},
            filtered=self.include_filter is not None or self.exclude_filter is not None,
            seed=self.seed,
            val_size=self.val_size,
            test_size=self.test_size,
            class_to_idx=self.class_to_idx,
            on_bad_image=self.on_bad_image,
            verify="all" if self.cache != "none" else self.verify,
            max_pixels=self.max_pixels,
        )
        index = assembly.build()
        self.bad_images, self.class_to_idx = assembly.bad_images, assembly.labels
        return index

    def _check_choices(self) -> None:
        if self.on_bad_image not in POLICIES:
            raise InputError(f"datamodule.on_bad_image must be error, skip or replace, got {self.on_bad_image!r}")
        if self.batch_size < 2:
            raise InputError(f"datamodule.batch_size must be at least 2, got {self.batch_size}")
        if not (self.num_workers == "auto" or (isinstance(self.num_workers, int) and self.num_workers >= 0)):
            raise InputError(f"datamodule.num_workers must be auto, or 0 or more, got {self.num_workers}")
        if self.verify not in ("auto", "all", "none"):
            raise InputError(f"datamodule.verify must be auto, all or none, got {self.verify!r}")
        self._check_cache()
        check_naming(self.labels, self.class_from)
        check_sizes(self.val_size, self.test_size)

    def _check_cache(self) -> None:
        if self.cache not in ("none", "ram", "disk"):
            raise InputError(f"datamodule.cache must be none, ram or disk, got {self.cache!r}")
        if self.cache == "none":
            return
        if self.verify == "none":
            raise InputError("datamodule.cache needs to know the images' contents and sizes; leave out verify=none")
        if not self.cache_shorter_side or self.cache_shorter_side < 1:
            raise InputError(f"datamodule.cache_shorter_side must be 1 or more, got {self.cache_shorter_side}")

    # Lightning's side

    def prepare_data(self) -> None:
        """Build the index unless it is there."""
        _ = self.index

    @property
    def cached_images(self) -> tuple[int, int]:
        """How many distinct images are in the cache, and how many will be."""
        return (0, 0) if self._pixels is None else (self._pixels.num_ready, self._pixels.num_images)

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets of all splits."""
        self._open_cache()
        transforms = {"train": self.train_transform, "val": self.val_transform, "test": self.test_transform}
        self._datasets = {
            split: self._image_dataset(self.images_of(split), transform) for split, transform in transforms.items()
        }

    def teardown(self, stage: str | None = None) -> None:
        """Say how far the cache has come."""
        if self._pixels is not None and stage == "fit":
            log.info("cache: %d of %d images", *self.cached_images)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of training images in an order drawn anew each epoch."""
        return self._train_loader(self._datasets["train"])

    def val_dataloader(self) -> Any:
        """Return batches of validation images, or nothing where there are none."""
        return self._eval_loader("val")

    def test_dataloader(self) -> Any:
        """Return batches of test images, or nothing where there are none."""
        return self._eval_loader("test")

    def _open_cache(self) -> None:
        if self.cache == "none" or self._pixels is not None:
            return
        from mlflow_ssl.datasets.pixels import PixelCache

        table = self.index.table
        widths, heights = (pc.fill_null(table[side], 0).to_numpy().astype(np.int64) for side in ("width", "height"))
        self._pixels = PixelCache.open(
            self.cache,
            digests=column(table, "digest"),
            widths=widths,
            heights=heights,
            shorter_side=self.cache_shorter_side or 1,
            decode_at_least=self.decode_at_least,
        )
        ready, all_images = self.cached_images
        log.info("cache of %d images, %.1f GB: %d are there", all_images, self._pixels.nbytes / 1e9, ready)

    def all_images(self, transform: Any, *, split: str | None = None) -> ImageDataset:
        """Return every image of the index or of a split, in its order, through a transform of the caller."""
        return self._image_dataset(self.index if split is None else self.index.split(split), transform)

    def _image_dataset(self, index: ImageIndex, transform: Any, *, pixels: bool = False) -> ImageDataset:
        return ImageDataset(
            index.by_row(open_reader(self.sources, index.whole)),
            index,
            transform=transform,
            seed=self.seed,
            pixels=pixels,
            on_bad_image=self.on_bad_image,
            bad_images=self.bad_image_list,
            decode_at_least=self.decode_at_least,
            cache=None if self._pixels is None else self._pixels.rows(index.column("digest")),
        )

    def example_image(self) -> npt.NDArray[np.uint8]:
        """Return the first training image that can be read, as pixels ``(H, W, 3)``.

        Raises:
            RuntimeError: if there is none among the first few.
        """
        images = self._image_dataset(self.index.split("train"), None)
        for row in range(min(len(images), 20)):
            try:
                return images.picture(row)
            except (OSError, DecodeError) as error:
                log.debug("no example: %s", error)
        raise RuntimeError(f"none of the first training images can be read any more: {self.root}")

    def _eval_loader(self, split: str) -> Any:
        dataset: Any = self._datasets[split]
        return self._dealt_loader(dataset) if len(dataset) else []

    def _dealt_loader(self, dataset: Any) -> DataLoader[Any]:
        """Return a loader of this process's share of the images, in their order."""
        rank, world_size = rank_and_world_size()
        return self._loader(dataset, batch_sampler=DealtBatches(len(dataset), self.batch_size, rank, world_size))

    def _train_loader(self, dataset: Any) -> DataLoader[Any]:
        rank, world_size = rank_and_world_size()
        sampler = EpochSampler(len(dataset), seed=self.seed, rank=rank, world_size=world_size, start=self._position)
        if len(sampler) < self.batch_size:
            raise InputError(
                f"datamodule.batch_size must be at most the training split's {len(sampler)} images, "
                f"got {self.batch_size}"
            )
        drop_last = num_batches(len(sampler), self.batch_size) * self.batch_size < len(sampler)
        return self._loader(dataset, sampler=sampler, drop_last=drop_last, persistent=True)

    def _loader(self, dataset: Any, *, persistent: bool = False, **kwargs: Any) -> DataLoader[Any]:
        plan = self._plan_loading()
        if "batch_sampler" not in kwargs:
            kwargs["batch_size"] = self.batch_size
        return DataLoader(
            dataset,
            num_workers=plan.workers,
            prefetch_factor=plan.prefetch,
            persistent_workers=persistent and plan.workers > 0,
            pin_memory=plan.pinned,
            collate_fn=collate,
            # its own: without workers a loader takes a number of the shared one every epoch, with them only once
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )

    def _plan_loading(self) -> LoadingPlan:
        """Choose how to load on this machine, and say so once."""
        _, world_size = rank_and_world_size()
        pa.default_memory_pool().release_unused()  # or what Arrow keeps for another time would not be free
        plan = plan_loading(
            self.num_workers,
            cores=usable_cores(),
            processes=world_size,
            gpu=torch.cuda.is_available(),
            batch_bytes=self.batch_size * nbytes(self._specimen()),
            free_bytes=free_memory(),
        )
        if not self._said_loading:
            self._said_loading = True
            log.info("images are loaded %s", plan)
        return plan

    def _specimen(self) -> Any:
        """Return a sample as large as those of the training."""
        grey = np.full((64, 64, 3), 100, dtype=np.uint8)
        return to_tensor(grey if self.train_transform is None else apply(self.train_transform, grey, draw=(0,)))

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
        self._images_done = state_dict["images"]
        self._position = (state_dict["epoch"], self._images_done // together * together)

    def deal_anew(self) -> int:
        """Go on with another number of processes than before, at the next whole optimizer step of theirs.

        The images up to there, less than a step's, are left out of this epoch: none is in it twice. Only where they
        would be the last of the epoch are some done again.

        Returns:
            The batches of each process that count as done.
        """
        trainer = self.trainer
        assert trainer is not None
        steps = trainer.accumulate_grad_batches  # batches
        together = self.batch_size * trainer.world_size
        own = len(self.index.split("train")) // trainer.world_size  # images
        done = whole_steps(self._images_done, together, steps, batches=num_batches(own, self.batch_size))
        self._position = (self._position[0], done * together)
        return done

    # what a joblib dump holds

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a training: its trainer, its cache, and data sets with absolute paths."""
        left_out: dict[str, Any] = {
            "trainer": None,
            "bad_image_list": None,
            "_opened": None,
            "_pixels": None,
            "_datasets": {},
            "_position": (0, 0),
            "_images_done": 0,
        }
        return self.__dict__ | left_out


def num_batches(images: int, batch_size: int) -> int:
    """Return the batches of an epoch; one of a single image is left out, as BatchNorm cannot normalize it.

    Example:
        >>> num_batches(10, 4), num_batches(9, 4)
        (3, 2)
    """
    return images // batch_size + (images % batch_size > 1)


def whole_steps(images: int, together: int, accumulated: int, *, batches: int) -> int:
    """Return the batches that count as done where images are: whole optimizer steps, and not the epoch's last.

    Args:
        images: of the epoch that have been trained on.
        together: images that all processes train on at once.
        accumulated: batches of an optimizer step.
        batches: of the epoch, for each process.

    Example:
        >>> whole_steps(24, 16, 1, batches=5), whole_steps(24, 16, 3, batches=5), whole_steps(24, 16, 1, batches=2)
        (2, 3, 1)
    """
    step = together * accumulated
    up, down = -(-images // step) * accumulated, images // step * accumulated
    return up if up < batches else down


def _strings(words: Sequence[str] | str | None) -> list[str] | None:
    return [words] if isinstance(words, str) else list(words) if words is not None else None
