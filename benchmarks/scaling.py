"""How a training scales over processes: ``python benchmarks/scaling.py [--rounds 3] [--steps 16] [KEY=VALUE]``.

Whole trainings, ``torchrun -m mlflow_ssl``, of 1, 2, 4, ... GPUs where there are some (nccl), otherwise of 1 and 2
processes on the CPU (gloo). There each has a core of its own and a thread, and loads its images itself. BatchNorm is
synchronized, as it is by default. Each round has them all in turns, every other the other way round:

- ``weak``: each process has the batch of the one, so that the ideal step takes as long;
- ``strong``: all share the batch of the one, so that the ideal step takes a part of the time;
- ``probe``: as ``weak``, but every other step leaves out summing the gradients (DDP's ``no_sync``), and all processes
  begin each step together. What the other steps take longer is the summing that computing does not hide.

A step is the time between the ends of two, on the first process: loading, network, optimizer, target, logging and all
callbacks included. Efficiency is that of the ideal step over that of the step, round by round; printed are medians with
least and most. Words of the form KEY=VALUE are settings of the training, as on its command line.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback
from scale_formulas import efficiency, ring_all_reduce_bytes

WARM = 3
"""Steps before those that are timed."""
MARKS = "MLFLOW_SSL_SCALING_MARKS"
PROBE = "MLFLOW_SSL_SCALING_PROBE"
LONGEST = 900
"""Seconds after which a training is given up."""


class Watch(Callback):
    """Keep each process of a CPU to a core, and write when its steps began and ended."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []
        self.gradient_bytes = 0
        self.probe = bool(os.environ.get(PROBE))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take a core."""
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
        if pl_module.device.type == "cpu":
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[trainer.local_rank % len(cores)]})
            torch.set_num_threads(1)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin together, if that is asked for, and say whether this step's gradients are summed."""
        if self.probe:
            torch.distributed.barrier()
            trainer.strategy.model.require_backward_grad_sync = batch_idx % 2 == 0
        self.began.append(now(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Note the end of a step."""
        self.ended.append(now(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what was noted, in one piece: whoever waits for the file reads it at once."""
        noted = {"began": self.began, "ended": self.ended, "gradient_bytes": self.gradient_bytes}
        file = Path(f"{os.environ[MARKS]}.{trainer.global_rank}")
        part = Path(f"{file}.part")  # of this process: the others write theirs at the same moment
        part.write_text(json.dumps(noted))
        part.rename(file)


def now(pl_module: Any) -> float:
    """Return the time, when the device has done what it was given."""
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.time()


class Size(NamedTuple):
    """What is trained: the backbone, pixels, and the images of a step of one process."""

    backbone: str
    pixels: int
    batch: int


class Training(NamedTuple):
    """One that is measured."""

    kind: str
    processes: int
    batch: int

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.kind}, {self.processes} x {self.batch}"


def size() -> Size:
    """Return what this machine trains."""
    return Size("resnet50", 224, 256) if torch.cuda.is_available() else Size("resnet18", 64, 32)


def counts() -> list[int]:
    """Return the numbers of processes, 1 first: powers of two, and all GPUs."""
    most = torch.cuda.device_count() if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))
    return sorted({*(2**power for power in range(8) if 2**power <= most), most})


def trainings(batch: int) -> list[Training]:
    """Return what each round measures; first that of one process."""
    kinds = (("weak", 1), ("strong", 0), ("probe", 1))
    many = [
        Training(kind, count, batch if whole else batch // count) for count in counts()[1:] for kind, whole in kinds
    ]
    return [Training("one", 1, batch), *many]


def command(training: Training, images: Path, scratch: Path, steps: int, words: Sequence[str]) -> list[str]:
    """Return the command of a training."""
    gpu, sized = torch.cuda.is_available(), size()
    starter = [sys.executable, "-W", "ignore"]
    if training.processes > 1:
        starter += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(training.processes)]
    return [
        *(*starter, "-m", "mlflow_ssl", "experiment=base/ssl/byol", f"data_path={images}", "trainer=auto"),
        *(f"backbone={sized.backbone}", f"backbone.small_stem={'auto' if gpu else 'false'}"),
        *(f"transforms={'byol_device' if gpu else 'byol'}", f"transforms.input_height={sized.pixels}"),
        *(f"transforms.input_width={sized.pixels}", f"datamodule.batch_size={training.batch}"),
        *(f"datamodule.num_workers={'auto' if gpu else 0}", "datamodule.verify=none", "datamodule.val_size=0.05"),
        *("datamodule.test_size=0.05", f"trainer.accelerator={'gpu' if gpu else 'cpu'}", "trainer.max_epochs=1"),
        *(f"trainer.limit_train_batches={WARM + steps}", "trainer.limit_val_batches=0"),
        *(f"core.output_dir={scratch / 'out'}", "+callbacks.watch._target_=scaling.Watch"),
        *words,
    ]


def measure(training: Training, images: Path, folder: Path, steps: int, words: Sequence[str]) -> list[dict[str, Any]]:
    """Train, and return what each process has noted; what comes after the last step is not waited for.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        MARKS: str(folder / "marks"),
        PROBE: "1" if training.kind == "probe" else "",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder.parent}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SSL_CACHE": str(folder.parent / "cache"),
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    if not torch.cuda.is_available():
        environment["OMP_NUM_THREADS"] = "1"
    files = [folder / f"marks.{rank}" for rank in range(training.processes)]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            command(training, images, folder, steps, words),
            cwd=folder,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            wait(process, files)
        finally:
            end(process)
    if not all(file.exists() for file in files):
        raise RuntimeError(f"{training} failed:\n{(folder / 'said').read_text()[-3000:]}")
    return [json.loads(file.read_text()) for file in files]


def wait(process: subprocess.Popen[bytes], files: Sequence[Path]) -> None:
    """Wait for files, or the end of a process, which looks at nothing often: it would take time from the training."""
    began = time.monotonic()
    while process.poll() is None and not all(file.exists() for file in files):
        if time.monotonic() - began > LONGEST:
            return
        time.sleep(0.5)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a training and the processes that it has started: torchrun's have sessions of their own."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def step_seconds(noted: Sequence[dict[str, Any]]) -> float:
    """Return the mean time between the ends of two steps."""
    ends = noted[0]["ended"][WARM - 1 :]
    return float((ends[-1] - ends[0]) / (len(ends) - 1))


def unhidden_share(noted: Sequence[dict[str, Any]]) -> float:
    """Return the share of a step that summing the gradients takes, of those that began together."""
    lasted = [
        max(one["ended"][number] - one["began"][number] for one in noted)
        for number in range(WARM, len(noted[0]["ended"]))
    ]
    first_summed = WARM % 2  # where `lasted` begins, and whether its first is even
    summed, alone = (statistics.median(lasted[start::2]) for start in (first_summed, 1 - first_summed))
    return float(1 - alone / summed)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return median, least and most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_tables(found: dict[Training, list[list[dict[str, Any]]]]) -> None:
    """Print what all rounds have found."""
    one, *many = found
    alone = [step_seconds(noted) for noted in found[one]]
    print("\n| training | a step, ms | images a second | efficiency |\n| --- | --- | --- | --- |")
    for training in (one, *(each for each in many if each.kind != "probe")):
        seconds = [step_seconds(noted) for noted in found[training]]
        images = [training.processes * training.batch / each for each in seconds]
        shares = [
            efficiency(first, each, processes=training.processes, strong=training.kind == "strong")
            for first, each in zip(alone, seconds, strict=True)
        ]
        cells = (spread([1000 * each for each in seconds], 0), spread(images, 1), spread(shares))
        print(f"| {training} | {' | '.join(cells)} |")
    print("\n| processes | gradients, MB | sent by each, MB | share of a step that summing them adds |")
    print("| --- | --- | --- | --- |")
    for training in (each for each in many if each.kind == "probe"):
        shares = [unhidden_share(noted) for noted in found[training]]
        nbytes = found[training][0][0]["gradient_bytes"]
        sent = ring_all_reduce_bytes(nbytes, training.processes)
        print(f"| {training.processes} | {nbytes / 1e6:.1f} | {sent / 1e6:.1f} | {spread(shares)} |")


def main() -> None:
    """Measure and print."""
    from floor import write_images

    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    asked = parser.parse_intermixed_args()
    sized, every = size(), trainings(size().batch)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, one a process"
    print(f"{platform.machine()}, {machine}; Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{sized.backbone}, {sized.pixels} px; {asked.rounds} rounds of {asked.steps} steps", flush=True)
    found: dict[Training, list[list[dict[str, Any]]]] = {training: [] for training in every}
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch, "images")
        write_images(images, max(counts()) * sized.batch * (WARM + asked.steps + 1) * 10 // 9 + 20, sized.pixels)
        for number in range(asked.rounds):
            for training in every if number % 2 == 0 else reversed(every):
                folder = Path(scratch, f"{number}-{every.index(training)}")
                found[training].append(measure(training, images, folder, asked.steps, asked.words))
    print_tables(found)


if __name__ == "__main__":
    main()
