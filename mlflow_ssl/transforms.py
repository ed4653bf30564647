"""How albumentations transforms are drawn, and turned into what a network takes."""

import hashlib
import random
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

cv2.setNumThreads(1)  # loader workers are the parallelism; OpenCV's own threads only fight them


def apply(transform: Any, image: npt.NDArray[Any], *, draw: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return ``transform`` of an image, its random numbers determined by ``draw`` alone.

    One generator is shared by all transforms of a composition. (albumentations' own ``set_random_seed`` gives each
    transform the same numbers, so that flip and jitter would come together.)

    Args:
        transform: an albumentations transform or composition.
        image: ``(H, W, C)``.
        draw: what the draw depends on, such as seed, epoch, image and view; integers from 0.
    """
    seed = hashlib.blake2b(np.array(draw, dtype="<u8").tobytes(), digest_size=40).digest()
    words: Any = _Words(seed[:32])
    generator = np.random.Generator(np.random.PCG64(words))
    transform.set_random_state(generator, random.Random(int.from_bytes(seed[32:], "little")))
    return transform(image=image)["image"]  # type: ignore[no-any-return]


class _Words(np.random.bit_generator.ISeedSequence):
    """Seeds a generator with a hash; numpy's own ``SeedSequence`` costs as much as to flip an image."""

    def __init__(self, words: bytes) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> npt.NDArray[Any]:
        """Return the hash."""
        return np.frombuffer(self._words, dtype=dtype, count=n_words)


def to_tensor(image: npt.NDArray[Any] | Tensor) -> Tensor:
    """Return an image ``(H, W, C)`` or ``(H, W)`` as float32 ``(C, H, W)``; bytes 0..255 become 0..1."""
    if isinstance(image, Tensor):  # the transform ended with ToTensorV2
        return image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if image.ndim == 2:
        image = image[..., None]
    scale = 1 / 255 if image.dtype == np.uint8 else 1.0
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
    return tensor if scale == 1.0 else tensor * scale
