"""How long a command takes to answer, and to take its first training step: ``python benchmarks/start.py [ROUNDS]``.

Compared with ``import torch, timm, mlflow, pytorch_lightning`` in turns, each in a process of its own. Processor
seconds of the process, which other work on the machine changes little, and wall time, which it changes much. Compiled
modules are there, as they are after the first start on a machine; so is the tracking store, but for one row.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Callback

IMPORTS = "import torch, timm, mlflow, pytorch_lightning"
STEP = "first step of experiment=byol"
NEW_STORE = f"{STEP}, the store made on the way"
UNTRAINED = "of it: measuring the untrained network"
MARKS = "MLFLOW_SSL_BENCHMARK_MARKS"


class Seconds(NamedTuple):
    """Processor and wall time."""

    cpu: float
    wall: float


class Stopwatch(Callback):
    """Take the times of a training's beginning, and end the process after its first step."""

    def __init__(self) -> None:
        self.marks: dict[str, tuple[float, float]] = {}

    def _mark(self, name: str) -> None:
        self.marks[name] = (sum(os.times()[:2]), time.time())

    def on_validation_start(self, *_: Any) -> None:
        """Mark."""
        self._mark("validation_start")

    def on_validation_end(self, *_: Any) -> None:
        """Mark."""
        self._mark("validation_end")

    def on_train_batch_end(self, *_: Any) -> None:
        """Mark, write and leave."""
        self._mark("step")
        Path(os.environ[MARKS]).write_text(json.dumps(self.marks))
        os._exit(0)


def measure(words: list[str], folder: Path) -> Seconds:
    """Run Python with some words and return what it took."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, usage = os.wait4(process.pid, 0)
    return Seconds(usage.ru_utime + usage.ru_stime, time.perf_counter() - began)


def measure_step(folder: Path) -> tuple[Seconds, Seconds]:
    """Train one step, and return what it took in all, and what of it the untrained network's validation."""
    marks = folder / "marks.json"
    environment = os.environ | {MARKS: str(marks), "PYTHONPATH": str(Path(__file__).parent)}
    words = ["-m", "mlflow_ssl", "experiment=byol", "+callbacks.stopwatch._target_=start.Stopwatch"]
    began = time.time()
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = {name: Seconds(cpu, wall - began) for name, (cpu, wall) in json.loads(marks.read_text()).items()}
    validation = Seconds(
        *(end - start for start, end in zip(found["validation_start"], found["validation_end"], strict=True))
    )
    return found["step"], validation


def measure_all(folder: Path) -> dict[str, Seconds]:
    """Return one round."""
    found = {
        IMPORTS: measure(["-c", IMPORTS], folder),
        "--help": measure(["-m", "mlflow_ssl", "--help"], folder),
        "experiment=nonsense": measure(["-m", "mlflow_ssl", "experiment=nonsense"], folder),
    }
    found[STEP], found[UNTRAINED] = measure_step(folder)
    with tempfile.TemporaryDirectory() as fresh:
        found[NEW_STORE], _ = measure_step(Path(fresh))
    return found


def spread(numbers: list[float]) -> str:
    """Return the median, the least and the most."""
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def main(rounds: int) -> None:
    """Print the table."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        measure_all(Path(folder))  # compiled modules, the store, the digits
        found = [measure_all(Path(folder)) for _ in range(rounds)]
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, threads: {threads}\n")
    print("| | processor seconds | ratio to the imports | wall seconds | ratio to the imports |")
    print("| --- | --- | --- | --- | --- |")
    for name in found[0]:
        cells = []
        for kind in ("cpu", "wall"):
            seconds = [getattr(each[name], kind) for each in found]
            ratios = [getattr(each[name], kind) / getattr(each[IMPORTS], kind) for each in found]
            cells += [spread(seconds), spread(ratios)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
