"""The same folder for self-supervised training."""

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader

from mlflow_ssl.datamodules.classification import ClassificationDataModule
from mlflow_ssl.datasets import ImageDataset, TwoAugmentationDataset
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.datasets.splits import deal
from mlflow_ssl.errors import InputError

QUERY_SHARE = 0.3
"""Share of the validation split that is asked where the split also has to be the bank."""


class SSLDataModule(ClassificationDataModule):
    """Two views of each training image, and clean images to measure embeddings by.

    Training batches are ``((view_1, view_2), labels)``. Validation and test have two loaders each, of
    ``(images, labels)``: first the bank, which is the training images through the validation transform, then the
    images to classify.

    Args:
        data_path: see `ClassificationDataModule`.
        augmentation_dataset: draws the views; this module gives it images and seed.
        split_validation: where the training images are of one class only, as in a folder of good parts, take 70 % of
            the validation split for the bank and classify the other 30 %.
        kwargs: see `ClassificationDataModule`.
    """

    def __init__(
        self,
        data_path: str,
        augmentation_dataset: TwoAugmentationDataset,
        *,
        split_validation: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_path, **kwargs)
        self.augmentation_dataset = augmentation_dataset
        self.split_validation = split_validation

    def _check_choices(self) -> None:
        super()._check_choices()
        views: object = self.augmentation_dataset
        if views is None:  # as in the tutorial's base config
            raise InputError("datamodule.augmentation_dataset must be a TwoAugmentationDataset, got null")

    @property
    def bank(self) -> ImageIndex:
        """The labelled images that neighbours are looked for among."""
        return self._bank_and_queries()[0]

    @property
    def queries(self) -> ImageIndex:
        """The validation images to classify; none where the bank has less than two classes."""
        return self._bank_and_queries()[1]

    def evaluated_images(self, split: str) -> ImageDataset:
        """Return the images of ``bank`` or ``val`` as a validation sees them, in its order.

        They have a transform of their own, so that another thread may read them while a loader does.
        """
        index = {"bank": self.bank, "val": self.queries}[split]
        return self._image_dataset(index, copy.deepcopy(self.val_transform))

    def drawn_views(self) -> TwoAugmentationDataset:
        """Return the views that the network is trained on; ask for ``(epoch, number)`` of a training image.

        They have transforms of their own, so that another thread may draw them while a loader does.
        """
        return copy.deepcopy(self.augmentation_dataset)

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets of all splits, and of the bank."""
        super().setup(stage)
        bank, queries = self._bank_and_queries()
        self._datasets["bank"] = self._image_dataset(bank, self.val_transform)
        self._datasets["val"] = self._image_dataset(queries, self.val_transform)
        train = self.index.split("train")
        self.augmentation_dataset.dataset = ImageDataset(
            self.root, train, transform=self.train_transform, seed=self.seed, pixels=True
        )
        self.augmentation_dataset.seed = self.seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of pairs of views."""
        return self._train_loader(self.augmentation_dataset)

    def val_dataloader(self) -> Any:
        """Return the loaders of bank and queries, or nothing where there is nothing to classify."""
        return self._bank_then("val")

    def test_dataloader(self) -> Any:
        """Return the loaders of bank and test images, or nothing where there is nothing to classify."""
        return self._bank_then("test")

    def _bank_then(self, split: str) -> list[DataLoader[Any]]:
        bank: Any = self._datasets["bank"]
        images: Any = self._datasets[split]
        return [self._loader(bank), self._loader(images)] if len(bank) and len(images) else []

    def _bank_and_queries(self) -> tuple[ImageIndex, ImageIndex]:
        train, val = self.index.split("train"), self.index.split("val")
        nothing = train.take(np.empty(0, dtype=np.int64))
        if _num_classes(train) > 1:
            return train, val
        if not self.split_validation or _num_classes(val) < 2:
            return nothing, nothing
        paths, drawn = np.array(val.paths), dict[str, str]()
        for label in np.unique(val.labels):
            shares = {"val": QUERY_SHARE, "train": 1 - QUERY_SHARE}
            drawn |= deal(paths[val.labels == label].tolist(), shares, seed=self.seed)
        asked = np.array([drawn[path] == "val" for path in val.paths])
        return val.take(np.flatnonzero(~asked)), val.take(np.flatnonzero(asked))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the images that the views are drawn from."""
        views = copy.copy(self.augmentation_dataset)
        views.dataset = None
        return super().__getstate__() | {"augmentation_dataset": views}


def _num_classes(index: ImageIndex) -> int:
    labels: npt.NDArray[np.int64] = index.labels
    return len(np.unique(labels))
