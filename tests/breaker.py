"""Callbacks for trainings by several processes: they have one of them fail, once, or write what all have seen."""

import os
import signal
import time
from pathlib import Path

from pytorch_lightning import Callback

BROKEN = Path("broken")
"""Stands in the current folder once it has happened."""


def raise_error():
    raise ValueError("cannot see the forest")


def hang():
    time.sleep(1e6)


WAYS = {
    "raises": raise_error,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(7),
    "hangs": hang,
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "goes on": lambda: None,
}


class Breaker(Callback):
    """Fail in a way, in a process, before an optimizer step; a file tells that it has happened."""

    def __init__(self, way, process, step, file=BROKEN):
        self.way, self.process, self.step, self.file = way, process, step, Path(file)

    def on_train_batch_start(self, trainer, *_):
        if (trainer.global_rank, trainer.global_step) == (self.process, self.step) and not self.file.exists():
            self.file.touch()
            WAYS[self.way]()


class Dawdler(Callback):
    """Have the first process compute for a while after the first epoch, and hang after the second."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_epoch_end(self, trainer, *_):
        if trainer.is_global_zero and trainer.current_epoch == 1:
            hang()
        until = time.monotonic() + self.seconds
        while trainer.is_global_zero and time.monotonic() < until:
            pass


class Witness(Callback):
    """Write ``epoch step row`` of each image that is trained on to ``seen-PROCESS.txt``."""

    def __init__(self):
        self.rows = []

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            views = type(trainer.datamodule.augmentation_dataset)
            draw = views.__getitem__

            def noted(dataset, key):
                self.rows.append(key[1])
                return draw(dataset, key)

            views.__getitem__ = noted

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        _, labels = batch
        with Path(f"seen-{trainer.global_rank}.txt").open("a") as seen:
            for row in self.rows[: len(labels)]:
                seen.write(f"{trainer.current_epoch} {trainer.global_step} {row}\n")
        del self.rows[: len(labels)]
