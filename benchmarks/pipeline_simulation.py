"""The input of many GPUs from an object store, simulated: ``python benchmarks/pipeline_simulation.py [WORDS]``.

- ``needed`` (by default): for so many images a second of a GPU, the workers and the bandwidth for which it waits less
  than 1 % of the time.
- ``sweep`` (by default): the share of the time that GPUs wait, with one thing changed at a time.
- ``nodes`` (by default): the same on more and more nodes, which wait for the slowest of all.
- ``cost``: measure here what a worker takes to make two views of an image: processor seconds, and the file's bytes.
- ``validate``: a real loader of this package with workers, a latency before each shard and a time for each image that
  are slept, beside what the simulation says of the same.

What is simulated: a worker opens a shard, waits for its first byte (lognormal), and reads it through a connection of
its own, all connections of a node sharing the node's line fairly; it makes views, and whole batches. It has at most
``prefetch`` of them under way, as `torch.utils.data.DataLoader` does, which hands on one worker's batch after the
other's. All GPUs begin a step together when each has its batch, since they sum their gradients. Not simulated: the
store's own limits, lost connections, the copy to the GPU, and the end of an epoch.

What is no measurement of ours is a default of `Pipeline` that says so: demand, latency and bandwidths.
"""

import math
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simpy
from scale_formulas import bandwidth_needed, network_bound, worker_bound

PIECE = 2**20
"""Bytes that travel at once: connections take turns with them on the line."""
WAITS_AT_MOST = 0.01
ROUNDS = 8
"""Halvings of the interval in which the bandwidth is looked for: to less than a hundredth."""


@dataclass(frozen=True)
class Pipeline:
    """What feeds the GPUs. Bytes, seconds, and bytes a second.

    Attributes:
        nodes: machines.
        gpus: of a node.
        demand: images a second that a GPU would take. An assumption: BYOL of a ResNet-50 at 224 px in bfloat16 does
            four forward and two backward passes an image.
        batch: images of a GPU's step.
        workers: loader processes of a GPU.
        prefetch: batches that each has under way at most.
        image_bytes: of a file. An assumption: ImageNet's mean, 138 GB for 1.28 million.
        image_seconds: of a processor, to make the two views of an image; ``cost`` measures it.
        shard_bytes: of a tar file.
        latency: median seconds from a request to its first byte. An assumption, as is its spread.
        latency_spread: sigma of the lognormal; 0.8 makes one of a hundred 6 times the median.
        connection_rate: of one connection. An assumption.
        node_rate: of a node's line. An assumption: 100 Gbit a second.
        read_ahead: bytes that a connection reads while the worker makes views; 0 has them take turns.
        staggered: whether workers begin anywhere in a shard, as if they had run for long, and not all at its beginning.
    """

    nodes: int = 1
    gpus: int = 8
    demand: float = 1000.0
    batch: int = 64
    workers: int = 12
    prefetch: int = 4
    image_bytes: float = 110e3
    image_seconds: float = 1 / 656
    shard_bytes: float = 256e6
    latency: float = 0.03
    latency_spread: float = 0.8
    connection_rate: float = 80e6
    node_rate: float = 12.5e9
    read_ahead: float = 8e6
    staggered: bool = True

    @property
    def piece(self) -> int:
        """Images that travel at once; they divide a batch."""
        most = max(PIECE // self.image_bytes, 1)
        return max(number for number in range(1, self.batch + 1) if self.batch % number == 0 and number <= most)


class Outcome(NamedTuple):
    """What came of it: the share of the time that GPUs waited, and the images a second of each."""

    waiting: float
    rate: float


class _Simulation:
    """One run. A line is a resource that serves a piece at a time: so its connections share it."""

    def __init__(self, pipeline: Pipeline, seed: int) -> None:
        self.pipeline = pipeline
        self.environment = simpy.Environment()
        self.draw = random.Random(seed)
        self.steps: list[tuple[float, float]] = []  # when each began, and how long the GPUs had waited
        self.batches: list[list[tuple[simpy.Store, simpy.Container]]] = []  # of each GPU's workers: made, and room
        for _ in range(pipeline.nodes):
            line = simpy.Resource(self.environment)
            for _ in range(pipeline.gpus):
                self.batches.append([self._start_worker(line) for _ in range(pipeline.workers)])
        self.environment.process(self._train())

    def _start_worker(self, line: simpy.Resource) -> tuple[simpy.Store, simpy.Container]:
        made = simpy.Store(self.environment)
        room = simpy.Container(self.environment, init=self.pipeline.prefetch)
        pieces = self._pieces(line)
        if self.pipeline.read_ahead > 0:
            pieces = self._ahead(pieces)
        self.environment.process(self._make(pieces, made, room))
        return made, room

    def _pieces(self, line: simpy.Resource) -> Iterator[Iterator[Any]]:
        """Yield, for each piece of shard after shard, what is waited for until it is there."""
        pipeline = self.pipeline
        left = pipeline.shard_bytes * (self.draw.random() if pipeline.staggered else 1.0)
        wait = self._latency()
        while True:
            yield self._read(line, wait)
            wait, left = 0.0, left - pipeline.piece * pipeline.image_bytes
            if left <= 0:
                left += pipeline.shard_bytes
                wait = self._latency()

    def _latency(self) -> float:
        return self.pipeline.latency * math.exp(self.draw.gauss(0, self.pipeline.latency_spread))

    def _read(self, line: simpy.Resource, wait: float) -> Generator[Any, Any, None]:
        if wait:
            yield self.environment.timeout(wait)
        nbytes = self.pipeline.piece * self.pipeline.image_bytes
        began = self.environment.now
        with line.request() as turn:
            yield turn
            yield self.environment.timeout(nbytes / self.pipeline.node_rate)
        slower = began + nbytes / self.pipeline.connection_rate - self.environment.now
        if slower > 0:
            yield self.environment.timeout(slower)

    def _ahead(self, pieces: Iterator[Iterator[Any]]) -> Iterator[Iterator[Any]]:
        """Read in a process of its own, so many pieces ahead, and yield how to wait for each."""
        nbytes = self.pipeline.piece * self.pipeline.image_bytes
        there = simpy.Store(self.environment, capacity=max(round(self.pipeline.read_ahead / nbytes), 1))

        def read() -> Generator[Any, Any, None]:
            for piece in pieces:
                yield from piece
                yield there.put(True)

        def take() -> Generator[Any, Any, None]:
            yield there.get()

        self.environment.process(read())
        while True:
            yield take()

    def _make(
        self, pieces: Iterator[Iterator[Any]], made: simpy.Store, room: simpy.Container
    ) -> Generator[Any, Any, None]:
        """Make batches, as a worker does."""
        pipeline = self.pipeline
        while True:
            yield room.get(1)
            for _ in range(pipeline.batch // pipeline.piece):
                yield from next(pieces)
                yield self.environment.timeout(pipeline.piece * pipeline.image_seconds)
            yield made.put(True)

    def _train(self) -> Generator[Any, Any, None]:
        """Take a batch for each GPU, from the workers in turn, and step with all of them."""
        waited, number = 0.0, 0
        while True:
            began = self.environment.now
            turn = [workers[number % self.pipeline.workers] for workers in self.batches]
            yield self.environment.all_of([made.get() for made, _ in turn])
            for _, room in turn:
                yield room.put(1)
            waited += self.environment.now - began
            self.steps.append((self.environment.now, waited))
            yield self.environment.timeout(self.pipeline.batch / self.pipeline.demand)
            number += 1


def simulate(pipeline: Pipeline, *, seconds: float = 30.0, warm_up: float = 20.0, seed: int = 0) -> Outcome:
    """Return what comes of a pipeline, of ``seconds`` after it has run for ``warm_up``.

    Args:
        pipeline: what feeds the GPUs.
        seconds: simulated ones.
        warm_up: simulated ones that do not count: buffers fill.
        seed: of latencies, and of where workers begin.
    """
    simulation = _Simulation(pipeline, seed)
    simulation.environment.run(until=warm_up + seconds)
    counted = [step for step in simulation.steps if step[0] >= warm_up]
    if len(counted) < 2:
        return Outcome(1.0, 0.0)
    (began, waited_before), (ended, waited_after) = counted[0], counted[-1]
    return Outcome(
        (waited_after - waited_before) / (ended - began), pipeline.batch * (len(counted) - 1) / (ended - began)
    )


def bandwidth_for(pipeline: Pipeline, **options: Any) -> float | None:
    """Return the least bytes a second of a GPU with which the GPUs wait less than 1 %; None if no bandwidth helps.

    Args:
        pipeline: whose ``node_rate`` is looked for.
        options: of `simulate`.
    """
    demand = bandwidth_needed(pipeline.demand, pipeline.image_bytes)

    def waiting(rate: float) -> float:
        return simulate(replace(pipeline, node_rate=rate * pipeline.gpus), **options).waiting

    low, high = 0.9 * demand, 4 * demand
    if waiting(high) >= WAITS_AT_MOST:
        return None
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if waiting(middle) >= WAITS_AT_MOST else (low, middle)
    return high


# what is printed

DEVICE = 1 / 1319
"""Processor seconds of an image with ``transforms=byol_device``; like that of `Pipeline`, of ``benchmarks/views.py``
and ``device_views.py``."""


SHORT: dict[str, Any] = {"seconds": 15.0, "warm_up": 10.0}


def workers_for(pipeline: Pipeline) -> int:
    """Return how many workers make, and read through a connection each, a tenth more than a GPU takes."""
    makes = worker_bound(1, pipeline.image_seconds)
    reads = network_bound(pipeline.connection_rate, pipeline.image_bytes)
    return math.ceil(1.1 * pipeline.demand / min(makes, reads))


def print_needed() -> None:
    """Print workers and bandwidth by demand."""
    print("\n| images a second of a GPU | transforms | workers | its images, MB/s | needed, MB/s | 8 GPUs, Gbit/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for demand in (500, 1000, 2000):
        for name, seconds in (("byol", Pipeline.image_seconds), ("byol_device", DEVICE)):
            pipeline = replace(Pipeline(demand=demand), image_seconds=seconds)
            pipeline = replace(pipeline, workers=workers_for(pipeline))
            rates = [bandwidth_for(pipeline, seed=seed, **SHORT) for seed in range(2)]
            needed = max(rate or math.inf for rate in rates)
            own = bandwidth_needed(demand, pipeline.image_bytes)
            cells = (f"{own / 1e6:.0f}", f"{needed / 1e6:.0f}", f"{64 * needed / 1e9:.1f}")
            print(f"| {demand:,} | {name} | {pipeline.workers} | {' | '.join(cells)} |", flush=True)


def print_sweep() -> None:
    """Print the share of waiting with one thing changed at a time."""
    base = Pipeline()
    base = replace(base, workers=workers_for(base))
    print("\n| changed | to | GPUs wait, % | images a second of a GPU |\n| --- | --- | --- | --- |")
    changes: dict[str, Sequence[Any]] = {
        "workers": (1, 3, 4),
        "prefetch": (1, 2, 8),
        "read_ahead": (0, 2e6, 32e6),
        "shard_bytes": (1e6, 10e6, 100e6, 1e9),
        "latency": (0.1, 0.3, 1.0),
        "latency_spread": (0, 1.5),
        "connection_rate": (20e6, 40e6, 60e6, 160e6),
        "node_rate": (0.5e9, 0.8e9, 0.9e9, 1e9, 1.25e9),
        "image_seconds": (DEVICE, 2 * Pipeline.image_seconds),
    }
    print_row("nothing", "", base)
    for name, values in changes.items():
        for value in values:
            print_row(name, f"{value:g}", replace(base, **{name: value}))


def print_row(name: str, value: str, pipeline: Pipeline) -> None:
    """Print what comes of a pipeline with three seeds."""
    found = [simulate(pipeline, seed=seed, **SHORT) for seed in range(3)]
    waiting, rate = (statistics.median(side) for side in zip(*found, strict=True))
    least, most = (choose(one.waiting for one in found) for choose in (min, max))
    print(f"| {name} | {value} | {waiting:.1%} ({least:.1%} to {most:.1%}) | {rate:.0f} |", flush=True)


def print_nodes() -> None:
    """Print the share of waiting by nodes."""
    base = Pipeline()
    base = replace(base, workers=workers_for(base))
    print("\n| nodes of 8 GPUs | | GPUs wait, % | images a second of a GPU |\n| --- | --- | --- | --- |")
    for nodes in (1, 4, 32):
        for prefetch in (1, 4):
            pipeline = replace(base, nodes=nodes, prefetch=prefetch)
            outcome = simulate(pipeline, **SHORT)
            print(f"| {nodes} | prefetch {prefetch} | {outcome.waiting:.1%} | {outcome.rate:.0f} |", flush=True)


# what is measured here


def photograph(width: int, height: int, seed: int) -> bytes:
    """Return a JPEG file with structure at all scales, as photographs have."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for side in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) * (4 / side) ** 0.5
    written = BytesIO()
    Image.fromarray((255 * pixels / pixels.max()).astype(np.uint8)).save(written, "JPEG", quality=90)
    return written.getvalue()


def print_cost(rounds: int = 5) -> None:
    """Print processor seconds and bytes of an image, of the size of a thumbnail and of ImageNet's."""
    import cv2
    import torch

    from mlflow_ssl.config import build, compose_config, resolve
    from mlflow_ssl.datasets.decode import decode
    from mlflow_ssl.transforms import apply

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print("\n| image | kB | transforms | images per CPU-second |\n| --- | --- | --- | --- |")
    for width, height in ((256, 256), (500, 375)):
        files = [photograph(width, height, seed) for seed in range(16)]
        for name in ("byol", "byol_device"):
            words = ["experiment=base/ssl/byol", "data_path=none", f"transforms={name}"]
            transforms = resolve(compose_config(words)).transforms
            both = [build(transforms.augmentation1), build(transforms.augmentation2)]
            rates = []
            for number in range(rounds + 1):
                began = time.process_time()
                for row, file in enumerate(files * 10):
                    image = decode(file)
                    for view, transform in enumerate(both, start=1):
                        apply(transform, image, draw=(0, number, row, view))
                rates.append(10 * len(files) / (time.process_time() - began))
            kept = rates[1:]  # the first warms up
            kilobytes = sum(map(len, files)) / len(files) / 1e3
            spread = f"{statistics.median(kept):.0f} ({min(kept):.0f} to {max(kept):.0f})"
            print(f"| {width}x{height} | {kilobytes:.0f} | {name} | {spread} |", flush=True)


def print_validation() -> None:
    """Print what a real loader does, and what the simulation says of it."""
    columns = ("workers", "prefetch", "latency, s", "its spread", "an image, ms", "demand", "real, images/s")
    print(f"\n| {' | '.join(columns)} | simulated | waits | simulated |")
    print(f"|{' --- |' * (len(columns) + 3)}")
    for workers, prefetch, latency, spread, image_seconds, demand in (
        (2, 2, 0.0, 0.0, 0.004, 10_000),
        (4, 2, 0.0, 0.0, 0.004, 10_000),
        (4, 2, 0.2, 0.0, 0.002, 10_000),
        (4, 2, 0.2, 0.8, 0.002, 10_000),
        (4, 2, 0.2, 0.0, 0.004, 600),
        (4, 1, 0.2, 0.8, 0.004, 600),
    ):
        pipeline = Pipeline(
            gpus=1,
            demand=demand,
            batch=16,
            workers=workers,
            prefetch=prefetch,
            image_bytes=10e3,
            image_seconds=image_seconds,
            shard_bytes=100 * 10e3,
            latency=latency,
            latency_spread=spread,
            connection_rate=1e12,
            node_rate=1e12,
            read_ahead=0,
            staggered=False,
        )
        real, said = load_for_real(pipeline), simulate(pipeline, seconds=100)
        cells = (f"{real.rate:.0f}", f"{said.rate:.0f}", f"{real.waiting:.1%}", f"{said.waiting:.1%}")
        asked = (workers, prefetch, latency, spread, f"{1000 * image_seconds:.0f}", demand)
        print(f"| {' | '.join(map(str, asked))} | {' | '.join(cells)} |", flush=True)


def load_for_real(pipeline: Pipeline, *, images: int = 6400, warm_up: int = 40) -> Outcome:
    """Return what comes of a loader of this package whose workers sleep for what a pipeline's do.

    Args:
        pipeline: of one GPU, without bandwidth and read-ahead.
        images: in the shards.
        warm_up: steps that do not count.
    """
    from mlflow_ssl.datasets.sources.shards import ShardSource
    from mlflow_ssl.datasets.stream import StreamLoader
    from mlflow_ssl.datasets.tables import column

    per_shard = int(pipeline.shard_bytes / pipeline.image_bytes)
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(images // per_shard):
            with tarfile.open(Path(folder, f"{shard:04d}.tar"), "w") as tar:
                for number in range(per_shard):
                    member = tarfile.TarInfo(f"{number:05d}.jpg")
                    member.size = int(pipeline.image_bytes)
                    tar.addfile(member, BytesIO(bytes(member.size)))
        source = ShardSource(folder)
        stream = _sleeping_stream()(
            source.root,
            column(source.scan().table, "path"),
            partial(_sleep, pipeline.image_seconds),
            seed=0,
            batch_size=pipeline.batch,
            num_workers=pipeline.workers,
            shuffle_buffer=1,
        )
        stream.latency = pipeline.latency, pipeline.latency_spread
        loader = StreamLoader(stream, epoch=lambda: 0, prefetch_factor=pipeline.prefetch, collate_fn=len)
        waited, marks, before = 0.0, [], time.perf_counter()
        for _ in loader:
            now = time.perf_counter()
            waited += now - before
            marks.append((now, waited))
            time.sleep(pipeline.batch / pipeline.demand)
            before = time.perf_counter()
    # the last batches come from workers that run out of shards at different moments
    (began, waited_before), (ended, waited_after) = marks[warm_up], marks[-warm_up]
    steps = len(marks) - 2 * warm_up
    return Outcome((waited_after - waited_before) / (ended - began), pipeline.batch * steps / (ended - began))


def _sleeping_stream() -> Any:
    from mlflow_ssl.datasets.stream import ShardStream

    class SleepingStream(ShardStream):
        latency = (0.0, 0.0)

        def _read(self, shards: Any) -> Generator[Any, Any, None]:
            median, spread = self.latency
            draw = random.Random(int(shards[0]))  # each worker has others
            for number in range(len(shards)):
                time.sleep(median * math.exp(draw.gauss(0, spread)))
                yield from super()._read(shards[number : number + 1])

    return SleepingStream


def _sleep(seconds: float, data: bytes, key: Any) -> Any:
    time.sleep(seconds)
    return key


TABLES = {
    "needed": print_needed,
    "sweep": print_sweep,
    "nodes": print_nodes,
    "cost": print_cost,
    "validate": print_validation,
}

if __name__ == "__main__":
    for word in sys.argv[1:] or ("needed", "sweep", "nodes"):
        TABLES[word]()
