"""Learning rate, speed, and time lost to data at each step."""

import time
from collections import deque
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class StepMetrics(Callback):
    """Log ``train/lr``, ``train/images_per_second`` of all devices together, and ``train/data_wait_share``.

    The last is the share of the time, in [0, 1], that passed between the end of one step and the batch for the next:
    what faster loading could save. Of several processes it is that of the first.

    Args:
        window: batches that the speed is the mean of.
    """

    def __init__(self, window: int = 50) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)
        self._waits: deque[float] = deque(maxlen=window)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew: what a validation took is not the training's speed."""
        self._marks.clear()
        self._waits.clear()
        self._marks.append((time.perf_counter(), 0))

    # a training that is resumed within an epoch does not begin one
    on_train_start = on_train_epoch_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the rate that this step will use; after the step the schedule has moved on."""
        _log(pl_module, "train/lr", trainer.optimizers[0].param_groups[0]["lr"])
        self._waits.append(time.perf_counter() - self._marks[-1][0])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the speed."""
        _, labels = batch
        self._marks.append((time.perf_counter(), len(labels) * trainer.world_size))
        seconds = self._marks[-1][0] - self._marks[0][0]
        images = sum(count for _, count in list(self._marks)[1:])
        _log(pl_module, "train/images_per_second", images / max(seconds, 1e-9))
        _log(pl_module, "train/data_wait_share", sum(self._waits) / max(seconds, 1e-9))


def _log(pl_module: LightningModule, name: str, value: float) -> None:
    """Log a number as a tensor of the host: Lightning would make one on the device, and wait for the device."""
    pl_module.log(name, torch.tensor(value))
