"""Metrics that callbacks watch: a name that is never logged is refused before it is missed."""

from collections.abc import Collection, Mapping

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn

from mlflow_ssl.errors import InputError


class Monitors(Callback):
    """Refuse an early stop or a choice of checkpoints by a metric that is not logged, at the first validation.

    Must stand before the callbacks that it looks at, whose own messages end in a traceback.

    Args:
        callbacks: by their names in the config.

    Raises:
        InputError: for the first such monitor, with the metrics that are logged.
    """

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self.callbacks = dict(callbacks)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at all of them, when everything is logged."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._check(trainer, {name: _monitor(callback) for name, callback in self.callbacks.items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at an early stop that does not wait for a validation."""
        early = {
            name: _monitor(callback)
            for name, callback in self.callbacks.items()
            if isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end
        }
        self._check(trainer, early)

    def _check(self, trainer: Trainer, monitors: Mapping[str, str | None]) -> None:
        for name, monitor in monitors.items():
            if monitor is not None:
                check_monitor(f"callbacks.{name}.monitor", monitor, trainer.callback_metrics)


def _monitor(callback: Callback) -> str | None:
    """Return the metric that a callback cannot do without."""
    if isinstance(callback, EarlyStopping):
        return callback.monitor if callback.strict else None
    if isinstance(callback, ModelCheckpoint) and callback.monitor not in ("epoch", "step"):  # which Lightning knows
        return callback.monitor
    return None


def check_monitor(key: str, monitor: str, logged: Collection[str]) -> None:
    """Refuse a monitor that is not among the metrics that are logged.

    Raises:
        InputError: naming the config key and the metrics.

    Example:
        >>> check_monitor("callbacks.health.monitor", "val_acc", ["train/loss", "val_acc"])
    """
    if monitor not in logged:
        raise InputError(
            f"{key} must be a metric that is logged, got {monitor!r}; logged are {', '.join(sorted(logged))}"
        )
