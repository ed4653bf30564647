"""The same folder for self-supervised training."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mlflow_ssl.datamodules.classification import ClassificationDataModule
from mlflow_ssl.datamodules.loading import collate
from mlflow_ssl.datasets import ImageDataset, TwoAugmentationDataset
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.datasets.sampler import Key
from mlflow_ssl.datasets.sources.shards import ShardSource
from mlflow_ssl.datasets.splits import SPLITS, deal, sample
from mlflow_ssl.datasets.stream import ShardStream, StreamLoader
from mlflow_ssl.datasets.tables import column
from mlflow_ssl.errors import InputError
from mlflow_ssl.processes import rank_and_world_size
from mlflow_ssl.transforms import apply

QUERY_SHARE = 0.3
"""Share of the validation split that is asked where the split also has to be the bank."""


class SSLDataModule(ClassificationDataModule):
    """Two views of each training image, and clean images to measure embeddings by.

    Training batches are ``((view_1, view_2), labels)``. Validation and test have two loaders each, of
    ``(images, labels)``: first the bank, which is the training images through the validation transform, then the
    images to classify. Where the images are not of two classes at least, there is one loader, of the split's images.
    Each process of a training has a part of them, see `mlflow_ssl.datasets.sampler.DealtBatches`.

    Args:
        data_path: see `ClassificationDataModule`.
        augmentation_dataset: draws the views; this module gives it images and seed.
        device_transforms: what is done to the batches of each view on the training device, see
            `mlflow_ssl.views.DeviceViews`; None where the loader's workers do all.
        shuffle_buffer: images that a worker mixes where shards are streamed.
        split_validation: where the training images are of one class only, as in a folder of good parts, take 70 % of
            the validation split for the bank and classify the other 30 %.
        kwargs: see `ClassificationDataModule`.
    """

    _max_bank: int | None = None
    _sampled: tuple[int, int, npt.NDArray[np.int64]] | None = None

    def __init__(
        self,
        data_path: str,
        augmentation_dataset: TwoAugmentationDataset,
        *,
        split_validation: bool = True,
        device_transforms: Sequence[Callable[..., Tensor]] | None = None,
        shuffle_buffer: int = 2048,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_path, **kwargs)
        self.device_transforms = list(device_transforms) if device_transforms is not None else None
        self.shuffle_buffer = shuffle_buffer
        self.augmentation_dataset = augmentation_dataset
        self.split_validation = split_validation

    def _check_choices(self) -> None:
        super()._check_choices()
        if isinstance(self.source, ShardSource) and (self.cache != "none" or self.unlabelled_path is not None):
            raise InputError("datamodule.cache and unlabelled_path are for images that are not streamed from shards")
        views: object = self.augmentation_dataset
        if views is None:  # as in the tutorial's base config
            raise InputError("datamodule.augmentation_dataset must be a TwoAugmentationDataset, got null")

    @property
    def bank(self) -> ImageIndex:
        """The labelled images that neighbours are looked for among; see `bound_bank`."""
        return self._bank_and_queries()[0]

    def bound_bank(self, max_bank: int | None) -> str | None:
        """Have at most ``max_bank`` images in the bank; the others are not even read for it.

        They are chosen by ``seed``, of each class its share, the same on every machine; None takes all.

        Returns:
            What the bank is in words, where images are left out.
        """
        self._max_bank = None
        whole = len(self.bank)
        self._max_bank = max_bank
        if self._datasets:
            self._datasets["bank"] = self._image_dataset(self.bank, self.val_transform)
        if max_bank is None or whole <= max_bank:
            return None
        return f"{max_bank:,} of {whole:,} labelled images, drawn by class with seed {self.seed}"

    @property
    def queries(self) -> ImageIndex:
        """The validation images: those to classify, or all of them where there is no bank."""
        return self._bank_and_queries()[1]

    def evaluated_images(self, split: str) -> ImageDataset:
        """Return the images of ``bank`` or ``val`` as a validation sees them, in its order.

        They have a transform of their own, so that another thread may read them while a loader does.
        """
        index = {"bank": self.bank, "val": self.queries}[split]
        return self._image_dataset(index, copy.deepcopy(self.val_transform))

    def drawn_views(self) -> "TwoAugmentationDataset | _FinishedViews":
        """Return the views that the network is trained on; ask for ``(epoch, number)`` of a training image.

        They have transforms of their own, so that another thread may draw them while a loader does. What a device does
        to them is drawn anew.
        """
        views = copy.deepcopy(self.augmentation_dataset)
        return views if self.device_transforms is None else _FinishedViews(views, self)

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets of all splits, and of the bank."""
        super().setup(stage)
        bank, queries = self._bank_and_queries()
        self._datasets["bank"] = self._image_dataset(bank, self.val_transform)
        self._datasets["val"] = self._image_dataset(queries, self.val_transform)
        if len(bank):
            self._datasets["test"] = self._image_dataset(self.index.split("test").labelled(), self.test_transform)
        self.augmentation_dataset.dataset = self._image_dataset(
            self.index.split("train"), self.train_transform, pixels=True
        )
        self.augmentation_dataset.seed = self.seed
        self.augmentation_dataset.as_bytes = self.device_transforms is not None

    def _epoch(self) -> int:
        """Return the epoch that begins; Lightning asks a resumed training's loader before it knows its own."""
        return max(self.trainer.current_epoch if self.trainer else 0, self._position[0])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Finish the views of a training batch, on the device that it has come to."""
        if self.device_transforms is None or self.trainer is None or not self.trainer.training:
            return batch
        views, labels = batch
        loop: Any = self.trainer.fit_loop.epoch_loop
        moment = (self.trainer.current_epoch, loop.batch_progress.current.ready)
        finished = self._finished(views, moment, share=rank_and_world_size())
        # Lightning has converted what came before: weights of bfloat16 take no float32
        return self.trainer.precision_plugin.convert_input(finished), labels

    def _finished(
        self, views: Sequence[Tensor], moment: tuple[int, ...], *, share: tuple[int, int] = (0, 1)
    ) -> tuple[Tensor, ...]:
        """Return views ``(B, 3, H, W)`` after the device's transforms, drawn by seed, moment and view alone.

        ``share`` says which images of a batch of all processes they are, see `mlflow_ssl.views.DeviceViews`.
        """
        transforms = self.device_transforms or []
        generators = [_generator(self.seed, *moment, view) for view in range(1, len(views) + 1)]
        finished = zip(transforms, views, generators, strict=True)
        return tuple(transform(images, generator, share=share) for transform, images, generator in finished)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of pairs of views."""
        source = self.source
        if isinstance(source, ShardSource):
            return self._stream_loader(source)
        return self._train_loader(self.augmentation_dataset)

    def _stream_loader(self, source: ShardSource) -> DataLoader[Any]:
        rank, world_size = rank_and_world_size()
        plan = self._plan_loading()
        train = self.index.split("train")
        stream = ShardStream(
            source.root,
            train.by_row(column(train.whole, "path")),
            partial(_streamed_views, self.augmentation_dataset),
            seed=self.seed,
            batch_size=self.batch_size,
            num_workers=plan.workers,
            shuffle_buffer=self.shuffle_buffer,
            rank=rank,
            world_size=world_size,
            start=self._position,
        )
        workers = stream.num_workers
        # Lightning cannot know that it is the very number
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        return StreamLoader(
            stream,
            epoch=self._epoch,
            prefetch_factor=plan.prefetch if workers else None,
            persistent_workers=workers > 0,
            pin_memory=plan.pinned,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> Any:
        """Return the loaders of bank and queries, or nothing where there is nothing to classify."""
        return self._bank_then("val")

    def test_dataloader(self) -> Any:
        """Return the loaders of bank and test images, or nothing where there is nothing to classify."""
        return self._bank_then("test")

    def _bank_then(self, split: str) -> list[DataLoader[Any]]:
        """Return the loaders of bank and images; that of the images alone where there is no bank."""
        bank: Any = self._datasets["bank"]
        images: Any = self._datasets[split]
        return [self._dealt_loader(part) for part in (bank, images) if len(part) and len(images)]

    def _bank_and_queries(self) -> tuple[ImageIndex, ImageIndex]:
        bank, queries = self._whole_bank_and_queries()
        if self._max_bank is None or len(bank) <= self._max_bank:
            return bank, queries
        if self._sampled is None or self._sampled[:2] != (self._max_bank, len(bank)):
            rows = sample(bank.column("path"), bank.labels, self._max_bank, seed=self.seed)
            self._sampled = self._max_bank, len(bank), rows
        return bank.take(self._sampled[2]), queries

    def _whole_bank_and_queries(self) -> tuple[ImageIndex, ImageIndex]:
        bank, val = self.index.split("train").labelled(), self.index.split("val")
        nothing = bank.take(np.empty(0, dtype=np.int64))
        if _num_classes(bank) > 1:
            return bank, val.labelled()
        if not self.split_validation or _num_classes(val.labelled()) < 2:
            return nothing, val
        val = val.labelled()
        asked = np.zeros(len(val), dtype=bool)
        for label in np.unique(val.labels):
            rows = np.flatnonzero(val.labels == label)
            shares = {"val": QUERY_SHARE, "train": 1 - QUERY_SHARE}
            dealt = deal(val.take(rows).column("path"), shares, seed=self.seed)
            asked[rows] = dealt == SPLITS.index("val")
        return val.take(np.flatnonzero(~asked)), val.take(np.flatnonzero(asked))

    def _specimen(self) -> Any:
        """Return a sample as large as those of the training."""
        grey = np.full((64, 64, 3), 100, dtype=np.uint8)
        if self.train_transform is not None:
            grey = apply(self.train_transform, grey, draw=(0,))
        return copy.deepcopy(self.augmentation_dataset).views((grey, 0), (0, 0))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the images that the views are drawn from."""
        views = copy.copy(self.augmentation_dataset)
        views.dataset = None
        return super().__getstate__() | {"augmentation_dataset": views, "_sampled": None}


def _streamed_views(views: TwoAugmentationDataset, data: bytes, key: Key) -> Any:
    images: Any = views.dataset
    return views.views(images.streamed(data, key), key)


class _FinishedViews:
    """Views as a device would finish them, one image at a time."""

    def __init__(self, views: TwoAugmentationDataset, datamodule: SSLDataModule) -> None:
        self._views = views
        self._datamodule = datamodule

    def __getitem__(self, key: tuple[int, int]) -> Any:
        sample = self._views[key]
        if sample is None:
            return None
        views, label = sample
        view_1, view_2 = self._datamodule._finished([view[None] for view in views], key)
        return (view_1[0], view_2[0]), label


def _generator(*draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(draw).generate_state(1, np.uint64)[0] >> 1))


def _num_classes(index: ImageIndex) -> int:
    labels: npt.NDArray[np.int64] = index.labels
    return len(np.unique(labels))
