"""Train in child processes that are killed again and again, and resume each time, until the training is done.

``python killed.py KILLS SEED STEPS WORD ...``: a process of its own, which imports everything once and forks.
"""

import importlib
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

from mlflow_ssl.cli import main

WARM = (
    "albumentations",
    "mlflow.pyfunc",
    "mlflow.pytorch",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow_ssl.tasks.ssl",
    "mlflow_ssl.tasks.training",
    "sklearn.linear_model",
    "timm",
)
"""What a training imports; its children need not do so again."""


def run():
    """Kill, resume, kill, resume, ... and let the last one finish."""
    for name in WARM:
        importlib.import_module(name)
    kills, seed, steps, *words = sys.argv[1:]
    chance = random.Random(int(seed))
    targets = sorted(chance.sample(range(1, int(steps)), int(kills)))
    for number, target in enumerate(targets):
        child = start(words)
        if number % 4 == 3:  # before it has begun to train
            time.sleep(chance.uniform(0, 2))
        else:
            wait_for_step(child, target)
            time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            raise SystemExit(f"training {number} ended by itself")
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(start(words), 0)[1]))


def start(words):
    """Train in a child and return its process id."""
    resumed = [*words, "resume=last"] if any(Path("outputs").rglob("run.json")) else words
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = main(resumed)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def wait_for_step(child, target):
    """Return once a step is logged, or beyond it."""
    while logged_step() < target:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit("a training ended by itself")
        time.sleep(0.002)


def logged_step():
    """Return the last optimizer step in the journal."""
    for journal in Path("outputs").rglob("records.jsonl"):
        with journal.open("rb") as lines:
            lines.seek(max(0, journal.stat().st_size - 4096))
            found = re.findall(rb'"train/loss",[^,]+,\d+,(\d+)\]', lines.read())
        if found:
            return int(found[-1])
    return 0


if __name__ == "__main__":
    run()
