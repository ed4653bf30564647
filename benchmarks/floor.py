"""How close this package is to what cannot be beaten, in one run and in turns.

    python benchmarks/floor.py [step] [update] [memory] [data] [knn] [start] [--rounds N] [--steps N] [--only WORDS]
                               [KEY=VALUE]

- ``step``: forward and backward of the same networks alone (two views through the online network, two through the
  target; no optimizer, no target update, no data, no logging), over the step of a training by Lightning with all that
  a training has: images from files, loss, LARS, target, metrics into an MLflow run, all callbacks. In float32 and
  bfloat16, channels last.
- ``update``: optimizer and target update as a share of the bare step, beside what it takes to copy the weights once:
  they read or write as much nine times at least.
- ``memory``: peak of each in a process of its own, above what stood there after the imports.
- ``data``: decoding alone over making a batch of pairs of views.
- ``knn``: one matrix product of queries and bank over finding the 20 nearest.
- ``start``: ``import torch`` over the time from the command to the first step of ``experiment=byol``.

A share of 1 is the limit. Printed are the median of the rounds, the least and the most. Where there is a GPU the steps
run on it, at the sizes it is for. Words of the form KEY=VALUE are settings of the training, as on its command line.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

WARM = 2
"""Steps before those that are timed."""


class Case(NamedTuple):
    """A training to measure."""

    backbone: str
    size: int
    batch: int
    precision: str

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.backbone}, {self.size} px, batch {self.batch}, {self.precision}"


class Timing(NamedTuple):
    """Seconds of a step: on the wall, and of this process's processors."""

    wall: float
    processor: float


def cases() -> list[Case]:
    """Return what is measured on this machine."""
    import torch

    sizes = [("resnet18", 32, 256), ("resnet18", 64, 64), ("resnet18", 224, 64)]
    if torch.cuda.is_available():
        sizes = [("resnet18", 32, 256), ("resnet50", 224, 256)]
    return [Case(*size, precision) for size in sizes for precision in ("32-true", "bf16-mixed")]


def write_images(folder: Path, count: int, size: int) -> None:
    """Write JPEG files of two classes, somewhat larger than the views."""
    from PIL import Image

    rng, side = np.random.default_rng(0), size * 8 // 7
    for number in range(count):
        file = folder / f"class_{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, quality=90)


# the step


def config_of(case: Case, folder: Path, steps: int, words: Sequence[str]) -> Any:
    """Return the resolved config of a training of so many steps."""
    from mlflow_ssl.config import compose_config, resolve
    from mlflow_ssl.machine import settle

    images = folder / f"images-{case.size}"
    batches = WARM + steps + 1
    if not images.exists():
        # of the largest batch, so that all cases of a size share them; a tenth each for validation and test
        write_images(images, 10 + case.batch * batches * 10 // 8, case.size)
    own = [
        "experiment=base/ssl/byol",
        "trainer=auto",
        f"data_path={images}",
        f"backbone={case.backbone}",
        # on a CPU the small stem makes a step of minutes
        f"backbone.small_stem={'auto' if on_gpu() else 'false'}",
        f"transforms={'byol_device' if on_gpu() else 'byol'}",
        f"transforms.input_height={case.size}",
        f"transforms.input_width={case.size}",
        f"datamodule.batch_size={case.batch}",
        "datamodule.num_workers=auto",
        "datamodule.val_size=0.1",
        "datamodule.verify=none",
        f"trainer.precision={case.precision}",
        "trainer.max_epochs=1",
        f"trainer.limit_train_batches={batches}",
        "trainer.limit_val_batches=0",
        "callbacks.progress.every_seconds=10",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
    ]
    config = compose_config([*own, *words])
    settle(config)
    return resolve(config)


def on_gpu() -> bool:
    """Return whether the steps run on a GPU."""
    import torch

    return torch.cuda.is_available()


def clock() -> Timing:
    """Return the time, when the device has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timing(time.perf_counter(), time.process_time())


def between(began: Timing, ended: Timing, steps: int) -> Timing:
    """Return the seconds of a step."""
    return Timing((ended.wall - began.wall) / steps, (ended.processor - began.processor) / steps)


def bare(config: Any, case: Case, steps: int) -> Timing:
    """Take the time of forward and backward of the networks that a config describes."""
    step, _ = bare_step(config, case)
    for _ in range(WARM):
        step()
    began = clock()
    for _ in range(steps):
        step()
    return between(began, clock(), steps)


def bare_step(config: Any, case: Case) -> tuple[Callable[[], None], Any]:
    """Return what makes a step, after which each parameter has a gradient, and the method."""
    import torch

    from mlflow_ssl.config import build

    device = torch.device("cuda" if on_gpu() else "cpu")
    method = build(config.model).to(device).train()
    method.on_fit_start()
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, case.batch, 3, case.size, case.size, generator=generator).to(device).unbind()
    view_1, view_2 = map(method.lay_out, views)
    trained = [p for module in method.trained_modules() for p in module.parameters()]

    def loss_of(view: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        prediction, projection = method.predictor(method.online(view)), method.target(other)
        losses: torch.Tensor = method.loss(prediction.float(), projection.float())
        return losses

    def step() -> None:
        for p in trained:
            p.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16-mixed"):
            loss = (loss_of(view_1, view_2) + loss_of(view_2, view_1)).mean()
        torch.autograd.backward(loss)

    return step, method


def whole(config: Any, case: Case, steps: int, folder: Path) -> Timing:
    """Take the time of a step of a training, between the beginnings of two batches."""
    from pytorch_lightning import Callback, seed_everything

    from mlflow_ssl.config import build
    from mlflow_ssl.tasks.training import _build_trainer, _plain
    from mlflow_ssl.tracking.lifecycle import tracked_run

    marks: dict[int, Timing] = {}

    class Marks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx in (WARM, WARM + steps):
                marks[batch_idx] = clock()

    output = Path(tempfile.mkdtemp(dir=folder))
    (output / "main.log").touch()
    config.callbacks.model_checkpoint.dirpath = config.callbacks.last_checkpoint.dirpath = str(output / "checkpoints")
    seed_everything(0, verbose=False)
    datamodule = build(config.datamodule)
    with chdir(folder), tracked_run(_plain(config), output=output) as run:  # where artifacts are put
        callbacks = {"marks": Marks()} | {name: build(node) for name, node in config.callbacks.items() if node}
        _build_trainer(config, run, callbacks, output).fit(build(config.model), datamodule)
    return between(marks[WARM], marks[WARM + steps], steps)


def memory(case: Case, kind: str, folder: Path, steps: int, words: Sequence[str]) -> float:
    """Return the peak memory of a training or of bare steps, MiB, in this process, which does nothing else."""
    import torch

    # bare with the C library's own way, which needs least
    own_way = mock.patch("mlflow_ssl.machine.keep_freed_memory") if kind == "bare" else nullcontext()
    with own_way:
        config = config_of(case, folder, steps, words)
    import mlflow_ssl.tasks.training  # noqa: F401 what it imports is no memory of the training
    from mlflow_ssl.tracking.lifecycle import prepare_store

    prepare_store(config.tracking.uri)  # nor is what makes the store

    with Path("/proc/self/status").open() as status:
        before = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    if kind == "bare":
        bare(config, case, steps)
    else:
        whole(config, case, steps, folder)
    if on_gpu():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_step(rounds: int, steps: int, only: str, words: Sequence[str]) -> None:
    """Print the table of the steps."""
    import torch

    device = torch.cuda.get_device_name() if on_gpu() else f"{os.cpu_count()} cores"
    print("\n| step | bare, ms | whole, ms | bare / whole | of processor time |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for case in (case for case in cases() if only in str(case)):
            config = config_of(case, Path(scratch), steps, words)
            pairs = []
            for _ in range(rounds):
                with quiet():
                    pairs.append((bare(config, case, steps), whole(config, case, steps, Path(scratch))))
            walls = [floor.wall / ours.wall for floor, ours in pairs]
            processors = [floor.processor / ours.processor for floor, ours in pairs]
            bares, wholes = ([1000 * timing.wall for timing in side] for side in zip(*pairs, strict=True))
            cells = (least(bares), least(wholes), spread(walls), spread(processors))
            print(f"| {case} | {' | '.join(cells)} |", flush=True)
    print(f"\n{rounds} rounds of {steps} steps on {device}, {torch.get_num_threads()} threads")


def measure_update(rounds: int, only: str, words: Sequence[str]) -> None:
    """Print the table of optimizer and target update."""
    import torch

    from mlflow_ssl.target import update_target

    print("\n| update | bare step, ms | LARS, ms | target, ms | both / step | one copy of the weights, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for case in (case for case in cases() if only in str(case)):
            config = config_of(case, Path(scratch), 1, words)
            step, method = bare_step(config, case)
            optimizer = method._make_optimizer(method.parameter_groups())
            weights = torch.cat([p.detach().flatten() for group in optimizer.param_groups for p in group["params"]])
            copy = torch.empty_like(weights)
            works: list[Callable[[], Any]] = [
                step,
                optimizer.step,
                lambda: update_target(method.target, method.online, tau=0.99),  # noqa: B023 called before the next
                lambda: copy.copy_(weights),  # noqa: B023
            ]
            found = [[1000 * seconds_of_call(work) for work in works] for _ in range(rounds + 1)][1:]
            shares = [(lars + target) / whole for whole, lars, target, _ in found]
            whole, lars, target, copied = ([*column] for column in zip(*found, strict=True))
            cells = (least(whole), least(lars, 1), least(target, 1), spread(shares), least(copied, 1))
            print(f"| {case} | {' | '.join(cells)} |", flush=True)


def seconds_of_call(work: Callable[[], Any]) -> float:
    """Return how long a call takes, until the device has done it."""
    began = clock()
    work()
    return clock().wall - began.wall


def measure_memory(only: str, words: Sequence[str]) -> None:
    """Print the table of the peak memory."""
    print("\n| peak memory | bare, MiB | whole, MiB | whole / bare |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for case in (case for case in cases() if only in str(case)):
            floor, ours = (peak_of(case, kind, scratch, words) for kind in ("bare", "whole"))
            print(f"| {case} | {floor:.0f} | {ours:.0f} | {ours / floor:.2f} |", flush=True)


def peak_of(case: Case, kind: str, folder: str, words: Sequence[str]) -> float:
    """Return what `memory` finds in a process of its own."""
    command = [sys.executable, __file__, "one", json.dumps([*case]), kind, folder, *words]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


# data, neighbours and start


def measure_data(rounds: int) -> None:
    """Print the table of the data path: processor time of an image, in this process."""
    from mlflow_ssl.config import build
    from mlflow_ssl.datasets.decode import decode

    print("\n| data | decode, ms | batch of views, ms an image | decode / data path |\n| --- | --- | --- | --- |")
    for case in (Case("resnet18", 32, 64, "32-true"), Case("resnet18", 224, 64, "32-true")):
        with tempfile.TemporaryDirectory() as scratch:
            config = config_of(case, Path(scratch), 1, ["datamodule.num_workers=0"])
            datamodule = build(config.datamodule)
            datamodule.setup()
            loader = datamodule.train_dataloader()
            files = [path.read_bytes() for path in Path(scratch).rglob("*.jpg")][: case.batch]
            ours, floors = [], []
            for number in range(rounds + 1):
                began = time.process_time()
                images = sum(len(labels) for _, labels in loader)
                middle = time.process_time()
                for file in files:
                    decode(file)
                if number:  # the first warms up
                    ours.append(1000 * (middle - began) / images)
                    floors.append(1000 * (time.process_time() - middle) / len(files))
            shares = [floor / mine for floor, mine in zip(floors, ours, strict=True)]
            print(f"| {case.size} px | {least(floors, 3)} | {least(ours, 3)} | {spread(shares)} |", flush=True)


def measure_knn(rounds: int) -> None:
    """Print the row of the neighbours."""
    import torch

    from mlflow_ssl.evaluation.knn import nearest

    device = "cuda" if on_gpu() else "cpu"
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.randn(count, 512, generator=generator).to(device) for count in (4_000, 50_000))
    products = torch.empty(len(queries), len(bank), device=device)

    pairs = []
    for number in range(rounds + 1):
        floor = seconds_of_call(lambda: torch.mm(queries, bank.T, out=products))
        ours = seconds_of_call(lambda: nearest(queries, bank, 20))
        if number:
            pairs.append((floor, ours))
    shares = [floor / ours for floor, ours in pairs]
    floors, mine = zip(*pairs, strict=True)
    print("\n| neighbours | one product, s | nearest, s | product / nearest |\n| --- | --- | --- | --- |")
    print(f"| 4,000 of 50,000, 512 numbers | {least(floors, 2)} | {least(mine, 2)} | {spread(shares)} |", flush=True)


def measure_start(rounds: int) -> None:
    """Print the row of the start: the first step ends the process."""
    import_torch = [sys.executable, "-c", "import torch"]
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "first_step.py").write_text(STOPPER)
        ours = [
            sys.executable,
            "-m",
            "mlflow_ssl",
            "experiment=byol",
            "+callbacks.first_step._target_=first_step.FirstStep",
            f"tracking.uri=sqlite:///{scratch}/mlflow.db",
        ]
        for number in range(rounds + 1):
            floor, mine = seconds_of(import_torch, scratch, 0), seconds_of(ours, scratch, STOPPED)
            if number:  # the first makes the store and fills the caches
                pairs.append((floor, mine))
    floors, mines = zip(*pairs, strict=True)
    shares = [floor / mine for floor, mine in pairs]
    print("\n| start | import torch, s | command to first step, s | import / start |\n| --- | --- | --- | --- |")
    print(f"| experiment=byol | {least(floors, 2)} | {least(mines, 2)} | {spread(shares)} |", flush=True)


STOPPED = 42
"""Exit code of a training that has come to its first step."""

STOPPER = f'''
import os

from pytorch_lightning import Callback


class FirstStep(Callback):
    """End the process where the first step would begin."""

    def on_train_batch_start(self, *_):
        os._exit({STOPPED})
'''


def seconds_of(command: Sequence[str], folder: str, code: int) -> float:
    """Return how long a command takes that ends with an exit code."""
    began = time.perf_counter()
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True, check=False
    )
    if ended.returncode != code:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return time.perf_counter() - began


# what is printed


def spread(shares: Sequence[float]) -> str:
    """Return median, least and most."""
    return f"{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"


def least(values: Sequence[float], digits: int = 0) -> str:
    """Return least and median."""
    return f"{min(values):.{digits}f}, {statistics.median(values):.{digits}f}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's and MLflow's words out of the table."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def main() -> None:
    """Print the tables that were asked for."""
    if sys.argv[1:2] == ["one"]:
        case, kind, folder, *words = sys.argv[2:]
        with quiet():
            print(memory(Case(*json.loads(case)), kind, Path(folder), 2, words))
        return
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    asked = parser.parse_intermixed_args()
    settings = [word for word in asked.words if "=" in word]
    tables: dict[str, Callable[[], None]] = {
        "step": lambda: measure_step(asked.rounds, asked.steps, asked.only, settings),
        "update": lambda: measure_update(asked.rounds, asked.only, settings),
        "memory": lambda: measure_memory(asked.only, settings),
        "data": lambda: measure_data(asked.rounds),
        "knn": lambda: measure_knn(asked.rounds),
        "start": lambda: measure_start(asked.rounds),
    }
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import torch

    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    for name in [word for word in asked.words if "=" not in word] or tables:
        tables[name]()


if __name__ == "__main__":
    main()
