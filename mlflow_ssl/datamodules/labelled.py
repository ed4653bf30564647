"""The same folder for supervised training."""

import logging
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from mlflow_ssl.datamodules.classification import ClassificationDataModule
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)


class LabelledDataModule(ClassificationDataModule):
    """Images that have a class, of two classes at least; the others are left out.

    Batches are ``(images, labels)``. See `ClassificationDataModule` for the arguments.

    Raises:
        InputError: at `build_index`, also if the training images are not of two classes.
    """

    def build_index(self) -> ImageIndex:
        """Build the index, and check that there is something to learn."""
        index = super().build_index()
        classes = self.classes
        there = np.unique(index.split("train").labelled().labels)
        if len(there) < 2:
            named = ", ".join(classes[label] for label in there) or "none"
            raise InputError(
                f"datamodule.data_path must hold training images of at least two classes, got {len(there)} ({named}): "
                f"{self.root}; a data set is a folder of class folders"
            )
        if missing := [name for label, name in enumerate(classes) if label not in there]:
            log.warning("no training image is of %s: no image will be taken for one", ", ".join(missing))
        return index

    def images_of(self, split: str) -> ImageIndex:
        """Return the images of a split that have a class."""
        return super().images_of(split).labelled()

    def clean_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the training images through the validation transform, in their order; of a process a share.

        See `mlflow_ssl.datasets.sampler.DealtBatches`.
        """
        return self._dealt_loader(self._image_dataset(self.images_of("train"), self.val_transform))
