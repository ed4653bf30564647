"""A training of a sweep as a process of its own, on whichever machine this is called.

What takes it down, be it SIGKILL, takes down nothing else, and the memory of its device is free when it has ended.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

STOP_SECONDS = 45.0
"""How long a training that is told to stop may take to save and to send."""
KILL = "kill"
"""Says in a stop file that nothing is to be saved any more."""
LOOK_SECONDS = 0.5
"""Between two looks at whether it has ended."""


@dataclass(frozen=True)
class Training:
    """What is to be run.

    Attributes:
        words: for ``python -m mlflow_ssl``.
        here: the current folder, for configs and relative paths.
        log: file for what it prints.
        environment: variables beside those that there are.
        without: variables that it must not have.
    """

    words: tuple[str, ...]
    here: Path
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    @property
    def stop_file(self) -> Path:
        """A file that asks for an end of the training, wherever it runs."""
        return self.log.with_suffix(".stop")


def begin(training: Training, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Start a training.

    It gets no Ctrl-C of the terminal: whoever starts it passes one signal on, since a second one does not wait.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in training.without}
    with training.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mlflow_ssl", *training.words],
            cwd=training.here,
            env=inherited | dict(training.environment) | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def supervise(training: Training) -> int:
    """Run a training to its end and return its exit code, negative for the signal that killed it.

    Where it is interrupted itself, or finds the stop file, it has the training save and end; the file may ask to `KILL`
    it, too. One that has waited in a queue until it was to stop does not begin.
    """
    if training.stop_file.exists():
        return -signal.SIGTERM
    process = begin(training)
    told = False
    try:
        while process.poll() is None:
            if training.stop_file.exists():
                if _to_be_killed(training):
                    kill(process)
                elif not told:
                    told = True
                    process.terminate()
            time.sleep(LOOK_SECONDS)
    except BaseException:
        if _to_be_killed(training):
            kill(process)
        end(process)
        raise
    return process.returncode


def _to_be_killed(training: Training) -> bool:
    return training.stop_file.exists() and training.stop_file.read_text() == KILL


def end(process: "subprocess.Popen[bytes]") -> int:
    """Tell a training to stop, wait until it has saved, and return its exit code."""
    process.terminate()
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        kill(process)
        return process.wait()


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a training and the workers of its loaders."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has just ended
        process.kill()
