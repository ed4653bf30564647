"""Two views of one image."""

from collections.abc import Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlflow_ssl.datasets.sampler import Key
from mlflow_ssl.transforms import apply, to_tensor

Views = tuple[tuple[Tensor, Tensor], int]


class TwoAugmentationDataset(Dataset[Views | None]):
    """Decode an image once and draw two views of it, independently of each other.

    What is drawn depends on seed, epoch, image and view alone: not on workers, order or what was drawn before.

    Args:
        transform: two albumentations transforms, or one that draws both views.
        dataset: gives an RGB image ``(H, W, 3)`` and a class for a key; the datamodule fills it in.
        seed: another seed, other views.
        as_bytes: leave views of uint8 as they are, for a device to finish; the datamodule says so.

    Raises:
        ValueError: if there are not one or two transforms.
    """

    def __init__(
        self, transform: Any, dataset: Dataset[Any] | None = None, *, seed: int = 0, as_bytes: bool = False
    ) -> None:
        transforms = list(transform) if isinstance(transform, Sequence) else [transform, transform]
        if len(transforms) != 2:
            raise ValueError(f"transform must be one transform or a list of two, got {len(transforms)}")
        self.transform = transforms
        self.dataset = dataset
        self.seed = seed
        self.as_bytes = as_bytes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(cast(Sized, self._source))

    def __getitem__(self, key: int | Key) -> Views | None:
        """Return ``((view_1, view_2), label)``, views of shape ``(C, H, W)``; a bare index means epoch 0.

        None stands for an image that cannot be read, where the data set gives nothing for it.
        """
        key = key if isinstance(key, tuple) else (0, key)
        return self.views(self._source[key], key)

    def views(self, sample: tuple[Any, int] | None, key: Key) -> Views | None:
        """Return the views of an image ``(H, W, 3)`` and its class, as this data set does for a key."""
        if sample is None:
            return None
        image, label = sample
        if isinstance(image, Tensor):  # the datamodule's train_transform ends with ToTensorV2
            image = image.permute(1, 2, 0).numpy()
        view_1, view_2 = (
            self._finish(apply(transform, image, draw=(self.seed, *key, view)))
            for view, transform in enumerate(self.transform, start=1)
        )
        return (view_1, view_2), label

    def _finish(self, view: Any) -> Tensor:
        if self.as_bytes and isinstance(view, np.ndarray) and view.dtype == np.uint8:  # a quarter of the memory
            return torch.from_numpy(np.ascontiguousarray(view)).permute(2, 0, 1)
        return to_tensor(view)

    @property
    def _source(self) -> Dataset[Any]:
        if self.dataset is None:
            raise RuntimeError("dataset must be set before views are drawn; SSLDataModule.setup does so")
        return self.dataset
