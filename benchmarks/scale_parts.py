"""What parts of a training cost that grow with images and processes: ``python benchmarks/scale_parts.py [WORDS]``.

Measured on this machine as large as it allows, each in a process of its own; ``docs/scale.md`` extrapolates from them.

- ``shuffle``: the order of an epoch of a hundred million images, for one of 256 processes;
- ``index``: bytes of an image's row in memory and in files, memory of a process that has set up its data, and the time
  for digest and splits; of a million images and of four;
- ``build``: time and memory to build an index of four million images in shards that are remembered;
- ``stream``: to find the shards of ten million images, to read the headers of shards, and to recall them;
- ``network``: bytes that a step of ResNet-50 and ViT-B sums over 256 processes, and those of synchronized BatchNorm;
- ``checkpoint``: bytes of such a training's, and the time to write them;
- ``neighbours``: the search of one of 256 processes in its part of a bank, and the first one's putting together;
- ``start``: files and bytes that a process reads to import what it needs.
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from scale_formulas import ring_all_reduce_bytes, seconds_at, sync_batchnorm_bytes

IMAGES, PROCESSES, PER_SHARD = 100_000_000, 256, 1000
NETWORKS = {"resnet50": "lars", "vit16_base": "adamw"}
"""What is trained, and by which optimizer."""


def peak() -> float:
    """Return the most memory that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def held() -> float:
    """Return the memory that this process has now, MiB."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


class Clock:
    """Take the time of a block, by the wall and of this process's processors."""

    def __enter__(self) -> "Clock":
        """Begin."""
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self.wall, self.processor = time.perf_counter() - self._began[0], time.process_time() - self._began[1]


# each returns rows: what it is, and a number with its unit


Rows = list[tuple[str, str]]


def shuffle() -> Rows:
    """Shuffle."""
    from mlflow_ssl.datasets.sampler import EpochSampler

    before = held()
    sampler = EpochSampler(IMAGES, seed=0, rank=3, world_size=PROCESSES)
    with Clock() as clock:
        order = sampler.order(0)
    return [
        (f"order of {IMAGES:,}, s", f"{clock.wall:.1f} ({clock.processor:.1f} of a processor)"),
        ("its peak memory, MiB", f"{peak() - before:.0f}"),
        ("kept by a process, MiB", f"{order.nbytes / 2**20:.2f}"),
    ]


def simulated(count: int) -> Any:
    """Return an index of ``count`` images in shards, not read: eight of ten to train on, a thousand classes."""
    import pyarrow as pa

    from mlflow_ssl.datasets.index import INDEX, ImageIndex
    from mlflow_ssl.datasets.tables import nulls

    rng = np.random.default_rng(0)
    classes = pa.array([f"n{number:08d}" for number in range(1000)], pa.string())
    labels = rng.integers(0, 1000, count, dtype=np.int32)
    splits = rng.choice(3, count, p=[0.8, 0.1, 0.1]).astype(np.int32)
    sizes = rng.lognormal(np.log(100e3), 0.4, count).astype(np.int64)
    columns = {
        "path": paths(count),
        "class_name": pa.DictionaryArray.from_arrays(pa.array(labels), classes),
        "label": pa.array(labels),
        "split": pa.DictionaryArray.from_arrays(pa.array(splits), pa.array(["train", "val", "test"], pa.string())),
        "size": pa.array(sizes),
        "mtime_ns": pa.array(np.full(count, 1_700_000_000_000_000_000)),
        "offset": pa.array(np.cumsum(sizes) % 10**9),
        "part": pa.array(np.zeros(count, dtype=np.int8)),
    }
    unread = {name: nulls(count, INDEX.field(name).type) for name in ("digest", "width", "height")}
    table = pa.table({name: (columns | unread)[name] for name in INDEX.names})
    return ImageIndex(table.cast(INDEX).combine_chunks())


def paths(count: int) -> Any:
    """Return paths of so many images, a thousand in a shard."""
    import pyarrow as pa

    parts = [
        pa.array([f"shard-{shard:06d}.tar/{row:09d}.jpg" for row in range(shard * PER_SHARD, (shard + 1) * PER_SHARD)])
        for shard in range(count // PER_SHARD)
    ]
    return pa.concat_arrays(parts).cast(pa.large_string())


def index(count: int) -> Rows:
    """Build the index's side of a process's data."""
    _set_up(20_000)  # what imports and first calls take is no cost of the images
    import pyarrow as pa

    before, allocated = held(), pa.total_allocated_bytes()
    rows = _set_up(count)
    rows.append(
        ("of Arrow's in use after it, bytes an image", f"{(pa.total_allocated_bytes() - allocated) / count:.0f}")
    )
    rows.append(("held after it, bytes an image", f"{(held() - before) * 2**20 / count:.0f}"))
    rows.append(("peak, bytes an image", f"{(peak() - before) * 2**20 / count:.0f}"))
    return [(f"{count:,} images: {name}", value) for name, value in rows]


def _set_up(count: int) -> Rows:
    """Index so many images, and set up a datamodule for them, which stays."""
    from mlflow_ssl.config import build, compose_config, resolve
    from mlflow_ssl.datasets.splits import draw_splits
    from mlflow_ssl.datasets.tables import column

    table = simulated(count)
    rows = [("in memory, bytes an image", f"{table.table.nbytes / count:.0f}")]
    with Clock() as clock:
        _ = table.digest
    rows.append(("digest, µs an image", f"{1e6 * clock.processor / count:.2f}"))
    with Clock() as clock:
        names, classes = column(table.table, "path"), column(table.table, "class_name")
        draw_splits(names, classes, seed=0, val_size=0.1, test_size=0.1)
    rows.append(("splits, µs an image", f"{1e6 * clock.processor / count:.2f}"))
    with tempfile.TemporaryDirectory() as folder:
        for write, name in ((table.write_parquet, "index.parquet"), (table.write_csv, "splits.csv")):
            write(Path(folder, name))
            rows.append((f"{name}, bytes an image", f"{Path(folder, name).stat().st_size / count:.1f}"))
        words = ["experiment=base/ssl/byol", f"data_path={folder}", "datamodule.num_workers=0"]
        datamodule = build(resolve(compose_config(words)).datamodule)
        datamodule._index = table
        with Clock() as clock:
            datamodule.setup()
            datamodule.bound_bank(100_000)
            datamodule.train_dataloader()
        rows.append(("setup, µs an image", f"{1e6 * clock.processor / count:.2f}"))
    KEPT.append(datamodule)
    return rows


KEPT: list[Any] = []
"""What a training would hold on to."""


def build(count: int = 4_000_000) -> Rows:
    """Build."""
    import pyarrow as pa

    from mlflow_ssl.datasets.contents import RACY_NS
    from mlflow_ssl.datasets.sources import shards

    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"MLFLOW_SSL_CACHE": f"{folder}/cache"}):
        for shard in range(count // PER_SHARD):
            Path(folder, f"shard-{shard:06d}.tar").touch()
        time.sleep(RACY_NS / 1e9 + 0.5)  # before that no shard is remembered
        with patch.object(shards, "_read_headers", _pretended):
            process = get_context("fork").Process(target=shards.ShardSource(folder).scan)  # whose memory is its own
            process.start()
            process.join()
        _index_of(f"{folder}/shard-{{000000..000019}}.tar")  # imports and first calls are no cost of the images
        before = held()
        with Clock() as clock:
            index = _index_of(folder)
        most = peak() - before
        nbytes = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*.arrow"))
    assert len(index) == count
    pa.default_memory_pool().release_unused()
    rows = [
        ("built of remembered shards, µs an image", f"{1e6 * clock.processor / count:.2f}"),
        ("held after it, bytes an image", f"{(held() - before) * 2**20 / count:.0f}"),
        ("peak, bytes an image", f"{most * 2**20 / count:.0f}"),
        ("what is remembered, bytes an image", f"{nbytes / count:.1f}"),
    ]
    return [(f"{count:,} images: {name}", value) for name, value in rows]


def _pretended(shard: Path, stamp: os.stat_result) -> Any:
    """Return what might be in a shard: a thousand images of a thousand classes."""
    import pyarrow as pa

    from mlflow_ssl.datasets.sources import FOUND, Found

    first = int(shard.stem[6:]) * PER_SHARD
    rng = np.random.default_rng(first)
    sizes = rng.lognormal(np.log(100e3), 0.4, PER_SHARD).astype(np.int64)
    columns = {
        "path": [f"{shard.name}/{row:09d}.jpg" for row in range(first, first + PER_SHARD)],
        "class_name": [f"n{label:08d}" for label in rng.integers(0, 1000, PER_SHARD)],
        "split": [""] * PER_SHARD,
        "size": sizes,
        "mtime_ns": np.full(PER_SHARD, stamp.st_mtime_ns),
        "ctime_ns": np.full(PER_SHARD, stamp.st_ctime_ns),
        "offset": np.cumsum(sizes // 512 * 512 + 2048),
    }
    return Found(pa.table({name: pa.array(columns[name], FOUND.field(name).type) for name in FOUND.names}), [])


def _index_of(data_path: str) -> Any:
    from mlflow_ssl.datasets.assembly import Assembly
    from mlflow_ssl.datasets.sources.shards import ShardSource

    return Assembly(
        ShardSource(data_path),
        None,
        split_files={},
        filtered=False,
        seed=0,
        val_size=0.1,
        test_size=0.1,
        class_to_idx=None,
        on_bad_image="error",
        verify="none",
        max_pixels=None,
    ).build()


def stream(count: int = 10_000_000) -> Rows:
    """Find shards."""
    from mlflow_ssl.datasets.contents import RACY_NS
    from mlflow_ssl.datasets.sources.shards import ShardSource
    from mlflow_ssl.datasets.stream import rows_by_shard

    many = paths(count)
    with Clock() as clock:
        found = rows_by_shard(many)
    rows = [(f"{len(found):,} shards of {count:,} images found, s", f"{clock.wall:.2f}")]
    shards = 50
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(shards):
            with tarfile.open(Path(folder, f"{shard:03d}.tar"), "w") as tar:
                for number in range(PER_SHARD):
                    for ending, content in (("jpg", bytes(1000)), ("cls", b"7")):
                        member = tarfile.TarInfo(f"{number:06d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, BytesIO(content))
        time.sleep(RACY_NS / 1e9 + 0.5)  # before that no shard is remembered
        cache = Path(folder, "cache")
        with patch.dict(os.environ, {"MLFLOW_SSL_CACHE": str(cache)}):
            for what in ("headers read and remembered", "remembered headers read"):
                with Clock() as clock:
                    ShardSource(folder).scan()
                used = 1e6 * clock.processor / shards / PER_SHARD
                rows.append((f"{what}, µs of a processor an image", f"{used:.1f}"))
    return rows


def method_of(backbone: str, optimizer: str) -> Any:
    """Return the method of a recipe at 224 px."""
    from mlflow_ssl.config import build, compose_config, resolve

    words = ["experiment=base/ssl/byol", "data_path=none", f"backbone={backbone}", f"optimizer={optimizer}"]
    config = resolve(compose_config([*words, "model.channels_last=true"]))
    return build(config.model)


def network(backbone: str, optimizer: str) -> Rows:
    """Count."""
    from torch import nn

    method = method_of(backbone, optimizer)
    gradients = sum(4 * p.numel() for p in method.parameters() if p.requires_grad)
    trained, copied = (
        [
            layer
            for module in modules
            for layer in module.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ]
        for modules in (method.trained_modules(), [method.target])
    )
    # both views through each network
    sums = 2 * sum(
        sync_batchnorm_bytes(layer.num_features, PROCESSES, backward=layers is trained)
        for layers in (trained, copied)
        for layer in layers
    )
    sent = ring_all_reduce_bytes(gradients, PROCESSES)
    times = ", ".join(f"{1000 * seconds_at(sent, gigabits):.1f} at {gigabits}" for gigabits in (100, 400, 1600))
    return [
        (f"{backbone}: gradients, MB", f"{gradients / 1e6:.1f}"),
        (f"{backbone}: sent by each of {PROCESSES} to sum them, MB", f"{sent / 1e6:.1f}"),
        (f"{backbone}: ms, at so many Gbit/s a GPU", times),
        (f"{backbone}: BatchNorm layers, of online and predictor; of the target", f"{len(trained)}; {len(copied)}"),
        (f"{backbone}: calls of all processes for them a step", f"{4 * len(trained) + 2 * len(copied)}"),
        (f"{backbone}: received by each for them, MB", f"{sums / 1e6:.1f}"),
    ]


def checkpoint(backbone: str, optimizer: str) -> Rows:
    """Write."""
    import torch

    from mlflow_ssl.checkpoint_io import AtomicCheckpointIO

    method = method_of(backbone, optimizer)
    made = method._make_optimizer(method.parameter_groups())
    for group in made.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    made.step()  # it has its velocities now
    saved = {"state_dict": method.state_dict(), "optimizer_states": [made.state_dict()]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "last.ckpt")
        seconds = []
        for _ in range(3):
            with Clock() as clock:
                AtomicCheckpointIO().save_checkpoint(saved, file)
            seconds.append(clock.wall)
        return [
            (f"{backbone}, {optimizer}: checkpoint, MB", f"{file.stat().st_size / 1e6:.0f}"),
            (f"{backbone}, {optimizer}: written in, s", f"{min(seconds):.2f} to {max(seconds):.2f}"),
        ]


def neighbours() -> Rows:
    """Search."""
    import torch

    from mlflow_ssl.evaluation.knn import Neighbours, merge, nearest

    bank, asked, width, num = 100_000, 10_000, 2048, 20
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(math.ceil(bank / PROCESSES), width, generator=generator)
    queries = torch.randn(asked, width, generator=generator)
    with Clock() as search:
        nearest(queries, own, num)
    similarities = torch.rand(PROCESSES, asked, num, generator=generator).sort(dim=2, descending=True).values
    rows = torch.randint(bank, (PROCESSES, asked, num), generator=generator)
    before = peak()
    with Clock() as together:
        merge([Neighbours(*part) for part in zip(similarities, rows, strict=True)], num)
    travel = asked * num * (similarities.element_size() + rows.element_size())
    return [
        (f"{asked:,} queries in {len(own)} of {bank:,} entries, s", f"{search.wall:.2f}"),
        (f"what {PROCESSES} have found put together, s", f"{together.wall:.2f}"),
        ("more peak memory for it, MiB", f"{peak() - before:.0f}"),
        ("received by each process, MB: queries", f"{asked * (4 * width + 16) / 1e6:.0f}"),
        ("of the bank", f"{bank * (4 * width + 16) / 1e6:.0f}"),
        ("of what was found", f"{PROCESSES * travel / 1e6:.0f}"),
    ]


def start() -> Rows:
    """Import."""
    with Clock() as clock:
        import mlflow_ssl.tasks.ssl  # noqa: F401
    files = {getattr(module, "__file__", None) for module in [*sys.modules.values()]}
    sizes = [Path(file).stat().st_size for file in files if isinstance(file, str) and Path(file).exists()]
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    libraries = [Path(file).stat().st_size for file in mapped if Path(file).exists()]
    return [
        ("modules, files", f"{len(sizes):,}"),
        ("modules, MB", f"{sum(sizes) / 1e6:.0f}"),
        ("libraries, files", f"{len(libraries):,}"),
        ("libraries, MB", f"{sum(libraries) / 1e6:.0f}"),
        ("imports, s of a processor", f"{clock.processor:.1f}"),
        ("memory after them, MiB", f"{held():.0f}"),
    ]


PARTS: dict[str, list[Callable[[], Rows]]] = {
    "shuffle": [shuffle],
    "index": [lambda: index(1_000_000), lambda: index(4_000_000)],
    "build": [build],
    "stream": [stream],
    "network": [lambda name=name: network(name, NETWORKS[name]) for name in NETWORKS],  # type: ignore[misc]
    "checkpoint": [lambda name=name: checkpoint(name, NETWORKS[name]) for name in NETWORKS],  # type: ignore[misc]
    "neighbours": [neighbours],
    "start": [start],
}


def main() -> None:
    """Print a table of each part."""
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread; Python {platform.python_version()}")
    for part in sys.argv[1:] or PARTS:
        print(f"\n| {part} | |\n| --- | --- |")
        for number in range(len(PARTS[part])):
            words = [sys.executable, "-W", "ignore", __file__, "one", part, str(number)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            for name, value in json.loads(done.stdout.splitlines()[-1]):
                print(f"| {name} | {value} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(PARTS[sys.argv[2]][int(sys.argv[3])]()))
    else:
        main()
