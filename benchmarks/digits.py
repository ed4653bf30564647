"""Train the demonstration with several seeds, and print what training added and how long it took.

    python benchmarks/digits.py [SEEDS]

Prints a row a seed: ``val_acc`` of the untrained network and of the best checkpoint, ``test_acc``, the accuracy of raw
pixels, and the seconds from command to registered model.
"""

import platform
import subprocess
import sys
import tempfile
import time

COLUMNS = ("val_acc_untrained", "val_acc", "test_acc", "test_acc_linear", "baseline_acc_pixels")


def train(seed: int) -> dict[str, float]:
    """Run the demonstration in a process and a folder of its own and return its metrics."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "mlflow_ssl", "experiment=byol", f"core.seed={seed}"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        seconds = time.perf_counter() - began
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        (run,) = client.search_runs(["1"])
        curve = client.get_metric_history(run.info.run_id, "val_acc")
        (version,) = client.search_model_versions("name='byol'")
        return run.data.metrics | {
            "val_acc_untrained": curve[0].value,
            "val_acc": float(version.tags["val_acc"]),
            "seconds": seconds,
        }


def main(num_seeds: int) -> None:
    """Print the table."""
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print("| seed | " + " | ".join(COLUMNS) + " | seconds |")
    print("|" + " --- |" * (len(COLUMNS) + 2))
    for seed in range(num_seeds):
        found = train(seed)
        cells = [f"{found[name]:.3f}" for name in COLUMNS]
        print(f"| {seed} | " + " | ".join(cells) + f" | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
