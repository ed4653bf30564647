"""Trainings by torchrun's agent whose processes are forked: everything is imported once, and not for each of them.

A process of its own, which reads one training a line: ``{"folder", "log", "processes", "words"}`` as JSON. It answers
with the process id of the agent when it has started it, and with its exit code when it has ended.
"""

import importlib
import json
import os
import sys

from killed import WARM
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mlflow_ssl.cli import main


def run():
    """Start what is asked for."""
    for name in (*WARM, "torch.distributed.elastic.multiprocessing.api"):
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            launch(asked)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def launch(asked):
    """Be torchrun, and exit as it does."""
    os.chdir(asked["folder"])
    os.environ |= asked["environment"]
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=asked["processes"],
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="fork",
        )
        elastic_launch(config, work)(asked["words"])
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def work(words):
    """Train, as one of the processes."""
    sys.argv = ["mlflow_ssl", *words]
    code = main(words)
    if code:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    run()
