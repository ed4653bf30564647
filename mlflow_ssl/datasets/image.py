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
        transform: albumentations transform; None leaves the picture as it is.
        seed: seed of a random transform.
        pixels: give what the transform gives, for another transform to take: RGB pixels ``(H, W, 3)`` of uint8 where
            there is none. Otherwise it becomes a float32 tensor ``(3, H, W)``.
    """

    def __init__(
        self, root: Path, index: ImageIndex, *, transform: Any = None, seed: int = 0, pixels: bool = False
    ) -> None:
        self.root = root
        self.transform = transform
        self.seed = seed
        self.pixels = pixels
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
        if self.transform is not None:
            image = apply(self.transform, image, draw=(self.seed, epoch, index, 0))
        return image if self.pixels else to_tensor(image), label
