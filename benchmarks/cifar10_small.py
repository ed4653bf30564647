"""Does the speed cost accuracy? ``experiment=cifar10/speedrun`` on a part of CIFAR-10, for a CPU.

``python benchmarks/cifar10_small.py ARCHIVE [--seeds 2] [--epochs 5]`` writes 2,000 training, 500 validation and
1,000 test images (see `build_cifar10`), trains on them for a few epochs in float32 with the workers' views, in bf16
likewise, and in bf16 with the views finished in batches, as on a GPU, and prints the accuracies of the untrained and of
the trained network.
So that it takes minutes, the network has ImageNet's stem: a fraction of the work. It says whether the recipe
learns and the ways agree, and nothing of the accuracy on all of CIFAR-10.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from build_cifar10 import build

WAYS = {
    "float32, transforms=cifar10": ["transforms=cifar10", "trainer.precision=32-true"],
    "bf16, transforms=cifar10": ["transforms=cifar10", "trainer.precision=bf16-mixed"],
    "bf16, transforms=cifar10_device": ["transforms=cifar10_device", "trainer.precision=bf16-mixed"],
}
WORDS = [
    *(
        "experiment=cifar10/speedrun",
        "trainer.accelerator=cpu",
        "backbone.small_stem=false",
    ),
    *(
        "datamodule.batch_size=64",
        "scheduler.warmup_epochs=1",
        "callbacks.knn.num_neighbours=20",
        "callbacks.pictures=null",
    ),
    *("datamodule.num_workers=0", "tracking.system_metrics=false", "registry.promote=never"),
]
COLUMNS = ("val_acc_untrained", "val_acc", "test_acc_weighted", "test_acc_linear")


def train(data: Path, way: list[str], seed: int, epochs: int) -> dict[str, float]:
    """Train in a process and a folder of its own, and return its metrics."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        words = [*WORDS, *way, f"data_path={data}", f"core.seed={seed}", f"trainer.max_epochs={epochs}"]
        command = [sys.executable, "-m", "mlflow_ssl", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        (experiment,) = [found for found in client.search_experiments() if found.name != "Default"]
        (run,) = client.search_runs([experiment.experiment_id])
        first = client.get_metric_history(run.info.run_id, "val_acc")[0].value
        return run.data.metrics | {"val_acc_untrained": first, "seconds": time.perf_counter() - began}


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser: Any = argparse.ArgumentParser(description="The speed run's recipe on a part of CIFAR-10.")
    parser.add_argument("archive", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    asked = parser.parse_args()
    print("| seed | | " + " | ".join(COLUMNS) + " | seconds |")
    print("|" + " --- |" * (len(COLUMNS) + 3))
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "cifar10")
        build(asked.archive, data, train=2000, val=500, test=1000)
        for seed in range(asked.seeds):
            for name, way in WAYS.items():
                found = train(data, way, seed, asked.epochs)
                cells = " | ".join(f"{found[column]:.3f}" for column in COLUMNS)
                print(f"| {seed} | {name} | {cells} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
