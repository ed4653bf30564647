"""Checkpoints to MLflow while the training goes on."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from mlflow_ssl.callbacks.last_checkpoint import LastCheckpoint
from mlflow_ssl.errors import InputError


class CheckpointUpload(Callback):
    """Upload ``last.ckpt`` and the best checkpoint now and then, in the background.

    A later upload takes the place of an earlier one: the artifacts do not grow with the epochs.

    Args:
        every_n_epochs: epochs between two uploads.

    Raises:
        InputError: if ``every_n_epochs`` is not above 0.
    """

    def __init__(self, every_n_epochs: int = 10) -> None:
        if every_n_epochs < 1:
            raise InputError(f"callbacks.checkpoint_upload.every_n_epochs must be at least 1, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Upload the state between two epochs."""
        if not trainer.current_epoch or trainer.current_epoch % self.every_n_epochs:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LastCheckpoint):
                callback.save(trainer)
        run: Any = getattr(trainer.logger, "run", None)
        if run is not None:
            run.log_checkpoints()
