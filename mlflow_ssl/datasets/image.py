"""Images one at a time."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mlflow_ssl.datasets.decode import read_image
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.datasets.sampler import Key
from mlflow_ssl.transforms import apply, to_tensor


class ImageDataset(Dataset[tuple[Any, int]]):
    """Image and class of each row of an index.

    Args:
        root: folder that the paths of the index are relative to.
        index: the rows.
        transform: albumentations transform; None gives RGB pixels as they are, ``(H, W, 3)`` of uint8.
        seed: seed of a random transform.
    """

    def __init__(self, root: Path, index: ImageIndex, *, transform: Any = None, seed: int = 0) -> None:
        self.root = root
        self.transform = transform
        self.seed = seed
        # Arrow and numpy, not lists: forked workers share them instead of copying them
        self._paths = index.table["path"].combine_chunks()
        self._labels = index.labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._labels)

    def __getitem__(self, key: int | Key) -> tuple[Any, int]:
        """Return image and class; a bare index means epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = read_image(self.root / self._paths[index].as_py())
        label = int(self._labels[index])
        if self.transform is None:
            return image, label
        return to_tensor(apply(self.transform, image, draw=(self.seed, epoch, index, 0))), label
