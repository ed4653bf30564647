"""How far a training is: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

SHOWN = {"train/loss": "loss {:.3f}", "val_acc": "val_acc {:.3f}", "train/images_per_second": "{:,.0f} images/s"}
"""Metrics that are shown, and how."""


class Progress(ProgressBar):
    """Show epoch, step, loss, ``val_acc``, images per second and time left; and how far a cache of images is filled.

    Args:
        every_seconds: time between two lines where there is no terminal.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._bar: Bar | None = None
        self._began = self._shown = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Show nothing: this process is not the first."""
        self._shown = float("inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw an empty bar."""
        self._began, self._first_step = time.monotonic(), trainer.global_step
        if self._shown == float("inf"):
            return
        self._shown = self._began
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(_status(trainer), total=int(trainer.estimated_stepping_batches))
            if _filling(trainer):
                self._bar.add_task("images in the cache")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or write a line when one is due; reading a metric waits for the device, so not each step."""
        now = time.monotonic()
        if now - self._shown < (0.2 if self._bar else self.every_seconds):
            return
        self._shown = now
        if self._bar:
            self._draw(self._bar, trainer)
        else:
            self._write_line(trainer, now - self._began)

    def _draw(self, bar: Bar, trainer: Trainer) -> None:
        steps, *cache = bar.task_ids
        bar.update(steps, completed=trainer.global_step, description=_status(trainer))
        for task in cache:
            filling = _filling(trainer)
            if filling:
                bar.update(task, completed=filling[0], total=filling[1])
            else:
                bar.update(task, visible=False)

    def _write_line(self, trainer: Trainer, seconds: float) -> None:
        total, done = int(trainer.estimated_stepping_batches), trainer.global_step
        left = seconds * (total - done) / max(done - self._first_step, 1)
        filling = _filling(trainer)
        cache = f"  cache {filling[0]:,}/{filling[1]:,}" if filling else ""
        log.info("%s  step %d/%d%s  %s left", _status(trainer), done, total, cache, clock(left))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the full bar standing."""
        if self._bar:
            self._draw(self._bar, trainer)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _status(trainer: Trainer) -> str:
    metrics = trainer.callback_metrics
    shown = [text.format(float(metrics[name])) for name, text in SHOWN.items() if name in metrics]
    epoch = min(trainer.current_epoch + 1, trainer.max_epochs or 1)
    return "  ".join([f"epoch {epoch}/{trainer.max_epochs}", *shown])


def _filling(trainer: Trainer) -> tuple[int, int] | None:
    """Return how many images of how many are in the cache; None where there is none, or all of them are."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    ready, total = getattr(datamodule, "cached_images", (0, 0))
    return (ready, total) if ready < total else None


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds.

    Example:
        >>> clock(3725)
        '1:02:05'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
