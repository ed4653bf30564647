"""Which image comes when."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Key = tuple[int, int]
"""Epoch and index of an image: what a data set needs to draw its views."""


class EpochSampler(Sampler[Key]):
    """All images of an epoch in an order that depends on seed and epoch alone.

    It yields epoch and index together. So workers need no shared epoch counter, and what they draw depends neither
    on their number nor on how far they run ahead. Processes are dealt the images in turn: their batches together hold
    the images that one process would have in a batch of that size.

    Args:
        num_images: size of the data set.
        seed: another seed, another order.
        rank: number of this process among ``world_size``.
        world_size: processes that share the epoch; each gets equally many images, what is left over is dropped.
        start: where a resumed training goes on: an epoch, and how many of its images all processes have seen.
    """

    def __init__(
        self, num_images: int, *, seed: int, rank: int = 0, world_size: int = 1, start: tuple[int, int] = (0, 0)
    ) -> None:
        self.num_images = num_images
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.epoch = start[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of images that this process sees in an epoch."""
        return self.num_images // self.world_size

    def __iter__(self) -> Iterator[Key]:
        """Yield epoch and index of each image."""
        epoch = self.epoch
        seen = self.start[1] if epoch == self.start[0] else 0
        for index in self.order(epoch)[seen // self.world_size :]:
            yield epoch, int(index)

    def order(self, epoch: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return the images that this process sees in an epoch, in their order.

        A hundred million images are shuffled in 400 MB, in a process of each GPU, of which only its own share stays.
        """
        order = np.arange(self.num_images, dtype=np.uint32 if self.num_images <= 2**32 else np.uint64)
        np.random.default_rng((self.seed, epoch)).shuffle(order)
        # a view would keep the whole order for as long as the epoch lasts
        return np.ascontiguousarray(order[self.rank : len(self) * self.world_size : self.world_size])


class DealtBatches(Sampler[list[int]]):
    """The batches of an evaluation, in the order of the images, dealt to the processes in turn.

    Each image is in one process once, and its batch is the same with any number of processes. Where there are fewer
    batches than processes, those left empty-handed borrow one: Lightning would have them skip the evaluation, and the
    others wait for them for ever. What comes of a borrowed batch does not count.

    Args:
        num_images: size of the data set, at least 1.
        batch_size: images of a batch; the last may have fewer.
        rank: number of this process among ``world_size``.
        world_size: processes that share the evaluation.

    Attributes:
        num_batches: of all processes together.
        borrowed: whether this process has borrowed its batch.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_batches = -(-num_images // batch_size)
        self.borrowed = rank >= self.num_batches
        # world_size is more than the batches where one is borrowed: there is no second
        self._numbers = range(rank % self.num_batches, self.num_batches, world_size)

    def __len__(self) -> int:
        """Return the number of batches of this process."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the images of each batch."""
        for number in range(len(self)):
            yield self.rows(number)

    def number(self, number: int) -> int:
        """Return the number among all batches of one of this process's."""
        return self._numbers[number]

    def rows(self, number: int) -> list[int]:
        """Return the images of one of this process's batches."""
        start = self.number(number) * self.batch_size
        return list(range(start, min(start + self.batch_size, self.num_images)))
