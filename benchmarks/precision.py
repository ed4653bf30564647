"""Whether bfloat16 trains as well as float32: `experiment=byol` with both, at equal epochs, with several seeds.

    python benchmarks/precision.py [RUNS] [--epochs N] [--seeds N] [--file FILE]

Trains up to RUNS networks that FILE has no figures of yet, two at a time with one thread each, and adds theirs; so a
long comparison can be made in pieces. Prints a row a seed, and the mean of the differences of ``val_acc`` with its 95 %
interval by Student's t: both precisions of a seed begin with the same weights, splits and views.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PRECISIONS = ("32-true", "bf16-mixed")


def train(precision: str, seed: int, epochs: int) -> float:
    """Train in a process and a folder of its own, and return the ``val_acc`` of the last epoch."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        words = [
            "experiment=byol",
            "trainer=lightning_cpu",
            f"trainer.precision={precision}",
            f"trainer.max_epochs={epochs}",
            f"core.seed={seed}",
            "callbacks.pictures=null",
            "tracking.system_metrics=false",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, "-m", "mlflow_ssl", *words]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        (run,) = client.search_runs(["1"])
        return float(client.get_metric_history(run.info.run_id, "val_acc")[-1].value)


def read(file: Path) -> dict[str, float]:
    """Return the figures that there are, by precision, seed and epochs."""
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    return found


def name(precision: str, seed: int, epochs: int) -> str:
    """Return what a training is called in the file."""
    return f"{precision} seed {seed} epochs {epochs}"


def report(figures: dict[str, float], seeds: int, epochs: int) -> None:
    """Print the table, and the mean difference where there are two at least."""
    from scipy.stats import t

    print(f"{platform.machine()}, Python {platform.python_version()}; {epochs} epochs, val_acc of the last")
    print("| seed | float32 | bfloat16 | difference |\n| --- | --- | --- | --- |")
    differences = []
    for seed in range(seeds):
        pair = [figures.get(name(precision, seed, epochs)) for precision in PRECISIONS]
        if pair[0] is not None and pair[1] is not None:
            differences.append(pair[1] - pair[0])
            print(f"| {seed} | {pair[0]:.3f} | {pair[1]:.3f} | {differences[-1]:+.3f} |")
    if len(differences) > 1:
        half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
        mean = statistics.mean(differences)
        print(f"\nmean difference {mean:+.3f}, 95 % interval {mean - half:+.3f} to {mean + half:+.3f}")


def main() -> None:
    """Train what is missing, and print what there is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="?", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--file", type=Path, default=Path(tempfile.gettempdir(), "mlflow_ssl-precision.json"))
    asked = parser.parse_args()
    figures = read(asked.file)
    every = [(precision, seed, asked.epochs) for seed in range(asked.seeds) for precision in PRECISIONS]
    missing = [each for each in every if name(*each) not in figures][: asked.runs]
    with ThreadPoolExecutor(2) as pool:
        for each, val_acc in zip(missing, pool.map(lambda each: train(*each), missing), strict=True):
            figures[name(*each)] = val_acc
            asked.file.write_text(json.dumps(figures, indent=2))
    report(figures, asked.seeds, asked.epochs)


if __name__ == "__main__":
    main()
