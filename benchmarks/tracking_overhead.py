"""What tracking costs a training: ``python benchmarks/tracking_overhead.py [ROUNDS]``.

The same training of 2,000 steps without tracking, with a healthy MLflow server over SQLite on the same machine, and
with one that died as the training began. Rounds are interleaved, and each is compared with its own training without
tracking, since machines are noisy. Beside the wall time stand the parts that cause it: the time that the training's
thread spends logging, and the processor time of the threads that send.
"""

import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from rich.console import Console
from rich.table import Table

from mlflow_ssl.callbacks import StepMetrics
from mlflow_ssl.config import build, compose_config, resolve
from mlflow_ssl.errors import NotSynced
from mlflow_ssl.tracking.lifecycle import tracked_run
from mlflow_ssl.tracking.logger import MLflowLogger

STEPS, BATCH, SIDE = 2000, 4, 16
WORDS = [
    "experiment=byol",
    "trainer=lightning_cpu",
    "data_path=none",
    "backbone.model_name=test_resnet",  # a step of tens of milliseconds: the shorter it is, the more tracking shows
    "model.encoder.projector.hidden_features=64",
    "tracking.system_metrics=true",
]


@dataclass
class Timing:
    """Seconds of a training: in all, logging in its thread, and of processors in the threads that send."""

    wall: float
    logging: float = 0.0
    sending: float = 0.0


class Batches:
    """The same two views again and again."""

    def __init__(self) -> None:
        views = torch.randn(2, BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).unbind()
        self.batch = (views, torch.zeros(BATCH, dtype=torch.long))

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Any]:
        return (self.batch for _ in range(STEPS))


class TimedLogger(MLflowLogger):
    """Take the time of each call."""

    seconds = 0.0

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Log."""
        began = time.perf_counter()
        super().log_metrics(*args, **kwargs)
        self.seconds += time.perf_counter() - began


def train(config: Any, logger: Any) -> float:
    """Train and return the seconds that it took."""
    torch.manual_seed(0)
    method = build(config.model)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger or False,
        callbacks=[StepMetrics()],
        log_every_n_steps=config.trainer.log_every_n_steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if logger:
        logger.run.step = lambda: trainer.global_step
    began = time.perf_counter()
    trainer.fit(method, Batches())
    return time.perf_counter() - began


def train_tracked(config: Any, plain: Any, folder: Path, *, dead: bool) -> Timing:
    """Train with a server of its own, which dies before the first step if so told."""
    folder.mkdir()
    timing = Timing(0)
    with server(folder) as (uri, process):
        plain["tracking"] |= {"uri": uri, "wait_at_end_seconds": 0 if dead else 60}
        (folder / "main.log").touch()
        try:
            with tracked_run(plain, output=folder) as run:
                logger = TimedLogger(run)
                if dead:
                    os.killpg(process.pid, signal.SIGKILL)
                before = sender_seconds()
                timing.wall = train(config, logger)
                timing.logging, timing.sending = logger.seconds, sender_seconds() - before
        except NotSynced:
            if not dead:
                raise
    return timing


def sender_seconds() -> float:
    """Return the processor seconds of the threads that send, as Linux counts them."""
    ticks = 0
    for thread in threading.enumerate():
        if thread.name.startswith(("mlflow-", "system-metrics")):
            fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(folder: Path) -> Iterator[Any]:
    """Run an MLflow server over SQLite."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-w", "1", "--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command = [sys.executable, "-m", "mlflow", "server", *words, "--artifacts-destination", str(folder / "files")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(rounds: int) -> None:
    """Print the table."""
    from omegaconf import OmegaConf

    torch.set_num_threads(1)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    config = resolve(compose_config(WORDS))
    plain = OmegaConf.to_container(config)
    timings: dict[str, list[tuple[Timing, float]]] = {"healthy server": [], "dead server": []}
    with tempfile.TemporaryDirectory() as scratch:
        without = train(config, None)  # caches and lazy imports
        without = train(config, None)
        for number in range(rounds):
            for name, measured in timings.items():
                folder = Path(scratch, f"{name.split()[0]}-{number}")
                tracked = train_tracked(config, plain, folder, dead=name == "dead server")
                after = train(config, None)
                measured.append((tracked, (without + after) / 2))  # before and after: a drift of the machine cancels
                without = after
    table = Table("tracking", "wall time over none", "logging, share of wall", "sending, share of a processor")
    for name, measured in timings.items():
        ratios = sorted(tracked.wall / without - 1 for tracked, without in measured)
        spread = f"{statistics.median(ratios):+.1%} ({ratios[0]:+.1%} to {ratios[-1]:+.1%})"
        logging = statistics.median(tracked.logging / tracked.wall for tracked, _ in measured)
        sending = statistics.median(tracked.sending / tracked.wall for tracked, _ in measured)
        table.add_row(name, spread, f"{logging:.2%}", f"{sending:.2%}")
    seconds = statistics.median(without for measured in timings.values() for _, without in measured)
    console = Console(width=120)
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread; {rounds} rounds of "
    )
    console.print(f"{STEPS:,} steps, {seconds:.0f} s each without tracking ({seconds / STEPS * 1000:.0f} ms a step)")
    console.print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
