"""What an epoch costs from 1 thousand to 1 million images: ``python benchmarks/scale_epoch.py [ROUNDS]``.

The index is simulated: as many rows as asked for, whose images are the same few JPEG files. So what differs between the
rows of the table is the number of images alone. Each size in a process of its own, in turns: images per CPU-second of
sampler, reading, decoding and two views at 64 px; the time from the beginning of an epoch to its first image, and
likewise of one that is resumed in its middle; the datamodule's setup; and what a loader's worker takes for itself when
it has read 5,000 images from all over the index.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
FILES, SIDE, BATCH, BATCHES = 50, 128, 64, 25
COLUMNS = {
    "rate": "images per CPU-second",
    "begin": "epoch begins, ms",
    "resume": "in its middle, ms",
    "setup": "setup, s",
    "worker": "a worker more, MiB",
}


def write_images(folder: Path) -> None:
    """Write JPEG files with structure at several scales."""
    for number in range(FILES):
        rng = np.random.default_rng(number)
        pixels = np.zeros((SIDE, SIDE, 3))
        for scale in (4, 32):
            noise = Image.fromarray(rng.integers(0, 256, (SIDE // scale, SIDE // scale, 3), dtype=np.uint8))
            pixels += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) * scale**0.5
        Image.fromarray((255 * pixels / pixels.max()).astype(np.uint8)).save(folder / f"{number:02d}.jpg", quality=90)


def simulated(count: int) -> Any:
    """Return an index of ``count`` rows of ten classes, 8 of 10 for the training."""
    import pyarrow as pa

    from mlflow_ssl.datasets.index import INDEX, ImageIndex

    rows = np.arange(count)
    names = pa.array([f"{number:02d}.jpg" for number in range(FILES)], pa.large_string())
    classes, splits = (
        pa.array(words, pa.string()) for words in ([str(number) for number in range(10)], ["train", "val"])
    )
    columns = {
        "path": names.take(pa.array(rows % FILES)),
        "class_name": pa.DictionaryArray.from_arrays(pa.array((rows % 10).astype(np.int32)), classes),
        "label": pa.array((rows % 10).astype(np.int32)),
        "split": pa.DictionaryArray.from_arrays(pa.array((rows % 11 > 8).astype(np.int32)), splits),
        "size": pa.array(np.full(count, 1000)),
        "mtime_ns": pa.array(np.zeros(count, dtype=np.int64)),
        "offset": pa.array(np.zeros(count, dtype=np.int64)),
        "part": pa.array(np.zeros(count, dtype=np.int8)),
    }
    table = pa.table({name: columns.get(name, pa.nulls(count)) for name in INDEX.names})
    return ImageIndex(table.cast(INDEX).combine_chunks())


def private() -> float:
    """Return the MiB that this process shares with no other."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(lines[key].split()[0]) for key in ("Private_Dirty", "Private_Clean", "Swap")) / 1024


def worker_memory(dataset: Any, rows: list[int]) -> float:
    """Return the MiB that a forked process takes for itself while it makes samples."""
    for row in rows[:100]:  # what the first images allocate is no index
        _ = dataset[0, row]
    read, write = os.pipe()
    if os.fork() == 0:
        before = private()
        for row in rows:
            _ = dataset.dataset.reader[row], dataset.dataset._labels[row]
        os.write(write, json.dumps(private() - before).encode())
        os._exit(0)
    return float(os.read(read, 100))


def measure(folder: str, count: int) -> dict[str, float]:
    """Return the figures of one size."""
    from mlflow_ssl.config import build, compose_config, resolve
    from mlflow_ssl.datasets import EpochSampler

    words = ["experiment=base/ssl/byol", "transforms.input_height=64", "transforms.input_width=64"]
    words += [f"data_path={folder}", f"datamodule.batch_size={BATCH}", "datamodule.num_workers=0"]
    datamodule = build(resolve(compose_config(words)).datamodule)
    datamodule._index = simulated(count)
    began = time.perf_counter()
    datamodule.setup()
    setup = time.perf_counter() - began
    loader = datamodule.train_dataloader()
    dataset, sampler = loader.dataset, loader.sampler
    cpu = time.process_time()
    batches = sum(1 for _ in islice(loader, min(BATCHES, len(loader) - 1)))
    rate = batches * BATCH / (time.process_time() - cpu)
    first = []
    for start in ((0, 0), (0, len(sampler) // 2)):
        one = EpochSampler(len(sampler), seed=0, start=start)
        began = time.perf_counter()
        next(iter(one))
        first.append(1000 * (time.perf_counter() - began))
    rows = np.random.default_rng(0).integers(len(sampler), size=5000).tolist()
    worker = worker_memory(dataset, rows)
    return {"rate": rate, "begin": first[0], "resume": first[1], "setup": setup, "worker": worker}


def main(rounds: int) -> None:
    """Print the table."""
    found: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        for _ in range(rounds):
            for count in COUNTS:
                words = [sys.executable, __file__, folder, str(count)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
                found[count].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{platform.machine()}, Python {platform.python_version()}, medians of {rounds} rounds\n")
    print(f"| images | {' | '.join(COLUMNS.values())} |")
    print(f"|{' --- |' * (len(COLUMNS) + 1)}")
    for count, figures in found.items():
        cells = [f"{statistics.median(each[key] for each in figures):.4g}" for key in COLUMNS]
        low, high = (choose(each["rate"] for each in figures) for choose in (min, max))
        cells[0] += f" ({low:.0f} to {high:.0f})"
        print(f"| {count:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
