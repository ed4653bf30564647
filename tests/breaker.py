"""Callbacks for trainings by several processes: one has one of them fail, once, and one writes what all have seen."""

import os
import signal
import time
from pathlib import Path

from pytorch_lightning import Callback

BROKEN = Path("broken")
"""Stands in the current folder once it has happened."""


def raise_error():
    raise ValueError("cannot see the forest")


WAYS = {
    "raises": raise_error,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(7),
    "hangs": lambda: time.sleep(1e6),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "goes on": lambda: None,
}


class Breaker(Callback):
    """Fail in a way, in a process, before an optimizer step."""

    def __init__(self, way, process, step):
        self.way, self.process, self.step = way, process, step

    def on_train_batch_start(self, trainer, *_):
        if (trainer.global_rank, trainer.global_step) == (self.process, self.step) and not BROKEN.exists():
            BROKEN.touch()
            WAYS[self.way]()


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
