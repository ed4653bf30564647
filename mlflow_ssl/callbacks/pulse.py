"""Where a training is, for the processes that watch each other."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from mlflow_ssl.watch import watch


class Pulse(Callback):
    """Say at each batch that the training goes on, and where the processes go at different paces.

    They go at the same pace from batch to batch, once the first is done: to compile and to fill buffers may take long.
    In what comes between epochs, and while a checkpoint is written, one may work and the others wait: there only a
    process that does nothing stands still.

    Must stand before the callbacks that take time.
    """

    def __init__(self) -> None:
        self._warm = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin, when all processes have met."""
        watch.move(stepping=False, timed=False)

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a step."""
        watch.move(stepping=self._warm)

    def on_train_batch_end(self, *_: Any) -> None:
        """Begin to load the next batch."""
        self._warm = True
        watch.move(stepping=True)

    def on_validation_batch_start(self, *_: Any) -> None:
        """Begin to embed a batch."""
        watch.move(stepping=self._warm)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Begin to load the next batch."""
        watch.move(stepping=self._warm)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the batches."""
        watch.move(stepping=False, timed=False)

    on_validation_start = on_validation_epoch_end = on_validation_end = on_train_end = on_test_start = (
        on_train_epoch_end
    )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have writing take its time."""
        watch.move(stepping=False, timed=False)
