"""Images one at a time."""

import copy
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from mlflow_ssl.datasets.bad_images import BAD_LABEL, BadImage, BadImageList
from mlflow_ssl.datasets.contents import content_digest
from mlflow_ssl.datasets.decode import DecodeError, decode
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.datasets.sampler import Key
from mlflow_ssl.datasets.sources.base import Reader
from mlflow_ssl.datasets.tables import column
from mlflow_ssl.transforms import apply, to_tensor

REPLACEMENTS = 20
"""Images that are tried in place of one; where all of them are bad something else is."""


class Pixels(Protocol):
    """Remembers decoded images, see `mlflow_ssl.datasets.pixels.PixelCache`."""

    def find(self, row: int) -> npt.NDArray[np.uint8] | None:
        """Return pixels ``(H, W, 3)``, or None."""
        ...

    def store(self, row: int, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Keep an image, and return what `find` will."""
        ...


class ImageDataset(Dataset[Any]):
    """Image and class of each row of an index.

    Args:
        reader: bytes of each row.
        index: the rows.
        transform: albumentations transform; None leaves the picture as it is.
        seed: seed of a random transform.
        pixels: give what the transform gives, for another transform to take: RGB pixels ``(H, W, 3)`` of uint8 where
            there is none. Otherwise it becomes a float32 tensor ``(3, H, W)``.
        on_bad_image: what becomes of an image that cannot be read any more: ``error`` raises; ``skip`` gives nothing,
            and ``replace`` another image of these, where ``pixels`` is set; an image to be evaluated is black then and
            has the label `BAD_LABEL`.
        bad_images: where it is listed.
        decode_at_least: see `mlflow_ssl.datasets.decode.decode`.
        cache: remembers decoded images.

    Raises:
        RuntimeError: from an access, naming the image, as ``on_bad_image`` says.
    """

    def __init__(
        self,
        reader: Reader,
        index: ImageIndex,
        *,
        transform: Any = None,
        seed: int = 0,
        pixels: bool = False,
        on_bad_image: str = "error",
        bad_images: BadImageList | None = None,
        decode_at_least: int | None = None,
        cache: Pixels | None = None,
    ) -> None:
        self.reader = reader
        self.transform = transform
        self.seed = seed
        self.pixels = pixels
        self.on_bad_image = on_bad_image
        self.bad_images = bad_images
        self.decode_at_least = decode_at_least
        self.cache = cache
        # Arrow and numpy, not lists: forked workers share them instead of copying them
        self._paths = index.by_row(column(index.whole, "path"))
        self._digests = None if cache is None else index.by_row(column(index.whole, "digest"))
        self._labels = index.by_row(index.whole["label"].to_numpy())

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._labels)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImageDataset":
        """Return the same images through a transform of its own: there may be a hundred million."""
        copied = copy.copy(self)
        copied.transform = copy.deepcopy(self.transform, memo)
        return copied

    def __getitem__(self, key: int | Key) -> Any:
        """Return image and class; a bare index means epoch 0."""
        epoch, row = key if isinstance(key, tuple) else (0, key)
        try:
            return self._finish(self.picture(row), (epoch, row), self._labels[row])
        except (OSError, DecodeError) as error:
            return self._instead((epoch, row), error)

    def picture(self, row: int) -> npt.NDArray[np.uint8]:
        """Return the decoded image ``(H, W, 3)`` of a row.

        Raises:
            OSError: if it cannot be read.
            DecodeError: if it is no image.
        """
        known = None if self.cache is None else self.cache.find(row)
        if known is not None:
            return known
        data = self.reader[row]
        image = self._decode(data)
        if self.cache is None or self._digests is None:
            return image
        changed = content_digest(data) != self._digests[row].as_py()  # since it was indexed
        return image if changed else self.cache.store(row, image)

    def streamed(self, data: bytes, key: Key) -> Any:
        """Return what ``self[key]`` would, for an image whose bytes are at hand; None for one that is skipped."""
        try:
            return self._finish(self._decode(data), key, self._labels[key[1]])
        except DecodeError as error:
            return self._instead(key, error)

    def _decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        return decode(data, at_least=self.decode_at_least)

    def _finish(self, image: npt.NDArray[Any], key: Key, label: int) -> tuple[Any, int]:
        if self.transform is not None:
            image = apply(self.transform, image, draw=(self.seed, *key, 0))
        return image if self.pixels else to_tensor(image), int(label)

    # what cannot be read

    def _instead(self, key: Key, error: Exception) -> Any:
        """Return what stands in for an image that cannot be read."""
        self._report(key[1], error)
        if not self.pixels:
            return self._finish(np.zeros((8, 8, 3), dtype=np.uint8), key, BAD_LABEL)
        return self._another(key) if self.on_bad_image == "replace" else None

    def _report(self, row: int, error: Exception) -> None:
        image = BadImage(self._paths[row].as_py(), reason(error))
        if self.on_bad_image == "error":
            raise RuntimeError(
                f"image was readable at the start and is not any more: {image.path}: {image.reason}; set "
                "datamodule.on_bad_image=skip or replace to go on without such images"
            ) from error
        if self.bad_images is not None:
            self.bad_images.add(image)

    def _another(self, key: Key) -> tuple[Any, int]:
        """Return another image, drawn by the key alone."""
        others = np.random.default_rng((self.seed, *key)).integers(len(self), size=REPLACEMENTS)
        for row in others.tolist():
            try:
                return self._finish(self.picture(row), key, self._labels[row])
            except (OSError, DecodeError) as error:
                self._report(row, error)
        raise RuntimeError(f"none of {REPLACEMENTS} images drawn in place of a bad one can be read; is the disk there?")


def reason(error: Exception) -> str:
    """Return in one line why an image cannot be read."""
    if isinstance(error, DecodeError):
        return str(error)
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"
