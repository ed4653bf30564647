"""Training images streamed from shards: read in the order that they lie in, mixed in a buffer."""

import logging
import random
import tarfile
from bisect import bisect_left
from collections.abc import Callable, Container, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mlflow_ssl.datasets.sampler import Key
from mlflow_ssl.datasets.sources.shards import shard_of
from mlflow_ssl.datasets.tables import Picked
from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

Make = Callable[[bytes, Key], Any]


class ShardStream(IterableDataset[Any]):
    """The training samples of shards, in an order that seed, epoch, ranks and workers determine.

    Shards come in an order of their own each epoch and are dealt to the processes of the training, and to the loader's
    workers of each. A worker reads its shards from the beginning to the end, and yields at random from a buffer. It
    yields whole batches only, as many in each process as in the others: what is left over waits for another epoch.

    Args:
        root: the folder of the shards.
        paths: Arrow strings by row, of the training images, those of a shard side by side as an index has them; a
            key is epoch and row.
        make: gives the sample of an image's bytes and key, or None for one that is skipped.
        seed: another seed, another order.
        batch_size: of the loader.
        num_workers: of the loader.
        shuffle_buffer: images that are held at once.
        rank: number of this process among ``world_size``.
        world_size: processes that share the epoch.
        start: where a resumed training goes on: an epoch, and how many of its images all processes have seen. The
            rest is what it would have been with as many processes and workers, unless an image was skipped before.

    Raises:
        InputError: if there are fewer shards than processes, or too few images for a batch from each worker.
    """

    def __init__(
        self,
        root: Path,
        paths: pa.Array | Picked,
        make: Make,
        *,
        seed: int,
        batch_size: int,
        num_workers: int = 0,
        shuffle_buffer: int = 2048,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.root = root
        self.make = make
        self.seed = seed
        self.batch_size = batch_size
        self.shuffle_buffer = shuffle_buffer
        self.rank = rank
        self.world_size = world_size
        self.start = start
        # shared, since a worker that lives on must learn of the next epoch
        self._epoch = torch.tensor(start[0])
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._paths = paths
        self._rows_of = rows_by_shard(self._paths)
        self._shards = list(self._rows_of)
        self._counts = np.array([len(rows) for rows in self._rows_of.values()], dtype=np.int64)
        if len(self._shards) < world_size:
            raise InputError(
                f"datamodule.data_path must hold a shard for each of the {world_size} processes at least, got "
                f"{len(self._shards)}"
            )
        # a worker without a shard would have nothing to do
        self.num_workers = min(num_workers, len(self._shards) // world_size)
        self._say_what_is_left_over()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; call it before each."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Return the images that this process sees in an epoch; the same in each epoch and process."""
        return self._quota() * max(self.num_workers, 1)

    def _streams(self) -> int:
        return self.world_size * max(self.num_workers, 1)

    def _deal(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Return the shards of each stream: of all workers of the first process, of the second, ..."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._shards))
        return [order[number :: self._streams()] for number in range(self._streams())]

    def _quota(self) -> int:
        """Return the images that each stream yields: whole batches of what the smallest shards hold together.

        A schedule has to know it before any epoch is dealt, and all the smallest ones might come to one worker.
        """
        smallest = np.sort(self._counts)[: len(self._counts) // self._streams()]
        return int(smallest.sum()) // self.batch_size * self.batch_size

    def _say_what_is_left_over(self) -> None:
        total, used = int(self._counts.sum()), len(self) * self.world_size
        if used == 0:
            raise InputError(
                f"datamodule.batch_size must be at most what the smallest shards hold for each of {self._streams()} "
                f"workers, got {self.batch_size}; lower it, or datamodule.num_workers"
            )
        if used < 0.95 * total:
            log.warning(
                "an epoch has %d of the %d images, since shards differ in size or are few for %d workers; the others "
                "come in other epochs",
                used,
                total,
                self._streams(),
            )

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of this worker."""
        worker = get_worker_info()
        epoch, workers = int(self._epoch), max(self.num_workers, 1)
        delivered = self.start[1] // (self.batch_size * self.world_size) if epoch == self.start[0] else 0  # batches
        # the loader asks one worker after the other for a batch, and begins with the first
        number = ((worker.id if worker else 0) + delivered) % workers
        stream = self.rank * workers + number
        seen = (delivered // workers + (number < delivered % workers)) * self.batch_size
        missing = self._quota() - seen
        for row, data in islice(self._shuffled(epoch, stream), seen, None):
            if missing == 0:
                return
            sample = self.make(data, (epoch, row))
            if sample is not None:
                missing -= 1
                yield sample
        if missing:
            yield from self._repeated(epoch, stream, missing)

    def _repeated(self, epoch: int, stream: int, missing: int) -> Iterator[Any]:
        """Yield again some of the first images, in place of images that were skipped."""
        for row, data in self._shuffled(epoch, stream):
            if missing <= 0:
                return
            sample = self.make(data, (epoch, row))
            if sample is not None:
                missing -= 1
                yield sample
        if missing > 0:
            raise RuntimeError("too few images of these shards can be read; data/bad_images.csv lists the others")

    def _shuffled(self, epoch: int, stream: int) -> Iterator[tuple[int, bytes]]:
        draw = random.Random(f"{self.seed} {epoch} {stream}")
        buffer: list[tuple[int, bytes]] = []
        for sample in self._read(self._deal(epoch)[stream]):
            buffer.append(sample)
            if len(buffer) >= self.shuffle_buffer:
                place = draw.randrange(len(buffer))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                yield buffer.pop()
        draw.shuffle(buffer)
        yield from buffer

    def _read(self, shards: npt.NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        """Yield row and bytes of the training images of some shards, in the order that they lie in.

        An image that is not there any more comes last, as an empty file, and fares like any that cannot be read.
        """
        for number in shards.tolist():
            shard = self._shards[number]
            rows = {self._paths[row].as_py(): row for row in self._rows_of[shard]}
            try:
                for path, data in _read_shard(self.root, shard, rows):
                    yield rows.pop(path), data  # a second member of the name does not count
            except (tarfile.TarError, OSError, EOFError) as error:
                if rows:
                    log.warning("%s was readable at the start and breaks off now: %s", shard, error)
            for row in rows.values():
                yield row, b""


def rows_by_shard(paths: pa.Array | Picked) -> dict[str, range]:
    """Return the rows of each shard.

    It looks at few of the paths, since there may be a hundred million.

    Args:
        paths: of images, those of a shard side by side.

    Example:
        >>> rows_by_shard(pa.array(["a.tar/0.png", "a.tar/1.png", "b.tar/0.png"]))
        {'a.tar': range(0, 2), 'b.tar': range(2, 3)}
    """
    rows: dict[str, range] = {}
    start = 0
    while start < len(paths):
        shard = shard_of(paths[start].as_py())
        others = range(start, len(paths))
        end = start + bisect_left(others, True, key=lambda row: shard_of(paths[row].as_py()) != shard)
        rows[shard] = range(start, end)
        start = end
    return rows


def _read_shard(root: Path, shard: str, paths: Container[str]) -> Iterator[tuple[str, bytes]]:
    from webdataset.tariterators import tar_file_iterator

    with (root / shard).open("rb") as file:
        for member in tar_file_iterator(file, skip_meta=None, select_files=lambda name: f"{shard}/{name}" in paths):
            yield f"{shard}/{member['fname']}", bytes(member["data"])


class StreamLoader(DataLoader[Any]):
    """A loader that tells its stream which epoch begins.

    Args:
        stream: what is loaded.
        epoch: returns the epoch that begins.
        kwargs: of `torch.utils.data.DataLoader`.
    """

    def __init__(self, stream: ShardStream, *, epoch: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(stream, batch_size=stream.batch_size, num_workers=stream.num_workers, **kwargs)
        self._begins = epoch

    def __iter__(self) -> Any:
        """Begin an epoch."""
        stream: Any = self.dataset
        stream.set_epoch(self._begins())
        return super().__iter__()
