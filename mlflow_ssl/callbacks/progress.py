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
from rich.table import Column

from mlflow_ssl.callbacks.health import Health

log = logging.getLogger(__name__)

SHOWN = {"train/loss": "loss {:.3f}", "val_acc": "val_acc {:.3f}", "embedding/rankme": "rank {:.1f}"}
"""Metrics that are shown, and how; the rank only where there is no ``val_acc``."""
SPEED = "{:,.0f} images/s"
ALARMING = ("collapsing", "diverging")
"""States that stand out on a terminal."""


class Progress(ProgressBar):
    """Show epoch, step, loss, ``val_acc``, images per second and time left, and the state that the training is in.

    The state is that of the `mlflow_ssl.callbacks.Health` beside it. Where a cache of images is being filled, that is
    shown too.

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
            whole = Column(no_wrap=True)  # on a narrow terminal the bar gets shorter, before any word does
            counts = MofNCompleteColumn(table_column=whole), TimeRemainingColumn(table_column=whole)
            self._bar = Bar(TextColumn("{task.description}"), BarColumn(), *counts, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(status(trainer, styled=True), total=_steps(trainer))
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
        bar.update(steps, completed=trainer.global_step, description=status(trainer, styled=True))
        for task in cache:
            filling = _filling(trainer)
            if filling:
                bar.update(task, completed=filling[0], total=filling[1])
            else:
                bar.update(task, visible=False)

    def _write_line(self, trainer: Trainer, seconds: float) -> None:
        total, done = _steps(trainer), trainer.global_step
        left = seconds * (total - done) / max(done - self._first_step, 1)
        filling = _filling(trainer)
        cache = f"  cache {filling[0]:,}/{filling[1]:,}" if filling else ""
        log.info("%s  step %d/%d%s  %s left", status(trainer), done, total, cache, clock(left))

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


def status(trainer: Trainer, *, styled: bool = False) -> str:
    """Return epoch, metrics and state of a training in one line; with rich's markup where it is ``styled``."""
    metrics = trainer.callback_metrics
    names = [name for name in SHOWN if name in metrics and (name != "embedding/rankme" or "val_acc" not in metrics)]
    shown = [SHOWN[name].format(float(metrics[name])) for name in names]
    if "train/images_per_second" in metrics:
        shown.append(SPEED.format(float(metrics["train/images_per_second"])))
    epoch = min(trainer.current_epoch + 1, trainer.max_epochs or 1)
    return "  ".join([f"epoch {epoch}/{trainer.max_epochs}", *shown, *_state(trainer, styled=styled)])


def _state(trainer: Trainer, *, styled: bool) -> list[str]:
    """Return what the health callback says of the training; nothing without one, or before its first validation."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    judging = (each for each in callbacks if isinstance(each, Health))
    states = [each.verdict.state for each in judging if each.verdict is not None and each.history[-1].step > 0]
    return [f"[bold red]{state}[/]" if styled and state in ALARMING else state for state in states]


def _steps(trainer: Trainer) -> int:
    """Return how many optimizer steps the training will have made."""
    return int(trainer.estimated_stepping_batches) - int(getattr(trainer.lightning_module, "steps_ahead", 0))


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
