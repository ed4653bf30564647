"""A loss that is not a number ends the training before it ruins the checkpoint."""

from collections import deque
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mlflow_ssl.callbacks.last_checkpoint import LastCheckpoint
from mlflow_ssl.errors import InputError

NAMED = 8
"""Images of the batch that are named."""


class DivergedError(InputError):
    """The loss or the weights are not finite: shown as one line that says where, and what to change."""


class FiniteLoss(Callback):
    """End the training at a loss, or at weights, that are infinite or not a number.

    Each step's loss is kept where it is, and they are looked at together now and then, and before every checkpoint, so
    that no step waits for the device and no checkpoint of ruined weights takes the place of a good one.

    Args:
        check_every: batches between two looks.

    Raises:
        DivergedError: naming the step, the images of the batch and the last good checkpoint.
    """

    def __init__(self, check_every: int = 50) -> None:
        if check_every < 1:
            raise ValueError(f"check_every must be at least 1, got {check_every}")
        self.check_every = check_every
        self._losses: deque[tuple[Tensor, int, int, int]] = deque()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._losses.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss, and look at the last ones if it is time."""
        self._losses.append((outputs["loss"].detach(), trainer.global_step, trainer.current_epoch, batch_idx))
        if len(self._losses) >= self.check_every:
            self._look(trainer, finite_weights=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is left."""
        self._look(trainer, finite_weights=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at losses and weights, so that this checkpoint is a good one."""
        if trainer.training:
            tensors = [parameter for parameter in pl_module.parameters() if parameter.is_floating_point()]
            finite = torch.stack([parameter.detach().isfinite().all() for parameter in tensors]).all()
            self._look(trainer, finite_weights=bool(finite))

    def _look(self, trainer: Trainer, *, finite_weights: bool) -> None:
        kept = list(self._losses)
        self._losses.clear()
        losses = torch.stack([loss for loss, *_ in kept]).isfinite().tolist() if kept else []
        wrong = next((row for row, finite in enumerate(losses) if not finite), None)
        bad = wrong is not None or not finite_weights
        if not trainer.strategy.reduce_boolean_decision(bad, all=False):
            return
        if wrong is None:
            what = "another process' loss" if finite_weights else "the weights"
            raise DivergedError(f"{what} became infinite or NaN at step {trainer.global_step}; {_advice(trainer)}")
        loss, step, epoch, batch_idx = kept[wrong]
        raise DivergedError(
            f"the loss became {loss.item()} at step {step}, on {_images(trainer, epoch, batch_idx)}; {_advice(trainer)}"
        )


def _images(trainer: Trainer, epoch: int, batch_idx: int) -> str:
    datamodule: Any = getattr(trainer, "datamodule", None)
    paths: list[str] = datamodule.batch_paths(epoch, batch_idx) if hasattr(datamodule, "batch_paths") else []
    if not paths:
        return f"batch {batch_idx} of epoch {epoch}"
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more


def _advice(trainer: Trainer) -> str:
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    last = next((callback.path for callback in callbacks if isinstance(callback, LastCheckpoint)), None)
    good = f"the last good checkpoint is {last}" if last is not None and last.exists() else "there is no checkpoint yet"
    return (
        f"{good}; lower scheduler.init_lr, raise scheduler.warmup_epochs, or set trainer.precision=32-true, and start "
        "anew"
    )
