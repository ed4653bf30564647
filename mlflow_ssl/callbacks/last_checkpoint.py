"""The state to go on from: written now and then, when a signal asks for it, and at the end."""

import logging
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from mlflow_ssl.errors import Interrupted
from mlflow_ssl.signals import stop_signals

log = logging.getLogger(__name__)

LONG_VALIDATION = 5.0
"""Seconds from which a validation is worth a checkpoint before it."""
AGREE_EVERY = 10
"""Steps between two questions of many processes whether to save: to agree makes them wait for each other."""


class LastCheckpoint(Callback):
    """Write ``last.ckpt`` between two optimizer steps, so that resuming from it is as if never stopped.

    It holds what Lightning's own does and the states of the random number generators, and is written where all that
    was done before is logged and nothing of what comes after has begun.

    Args:
        dirpath: its folder.
        every_seconds: time between two; a killed process costs at most that.

    Raises:
        Interrupted: once the state is saved, where a signal waits.
    """

    def __init__(self, dirpath: str, every_seconds: float = 60.0) -> None:
        self.path = Path(dirpath) / "last.ckpt"
        self.every_seconds = every_seconds
        self._saving = False
        self._saved = time.monotonic()
        self._validation_began = 0.0
        self._validation_seconds = float("inf")
        self._random: dict[str, Any] | None = None
        self._world_size = 1
        self._dealt_anew = False

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the random number generators, and the number of processes."""
        return random_state() | {"world_size": self._world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until all is set up that might draw from them."""
        self._random = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random numbers where the checkpoint was written."""
        self._world_size = trainer.world_size
        stop_signals.install()
        self._saved = time.monotonic()
        reschedule: Any = getattr(pl_module, "reschedule", None)
        if self._dealt_anew and reschedule is not None:
            reschedule()
        if self._random is not None and trainer.is_global_zero:
            set_random_state(self._random)
            self._random = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save if it is time, or if a signal has come, which then ends the training."""
        if batch_idx % trainer.accumulate_grad_batches or (
            trainer.world_size > 1 and trainer.global_step % AGREE_EVERY
        ):
            return
        signum = stop_signals.received()
        due = time.monotonic() - self._saved > self.every_seconds or self._before_long_validation(trainer)
        # all processes write a checkpoint together
        if trainer.strategy.reduce_boolean_decision(bool(signum) or due, all=False):
            self.save(trainer)
        if trainer.strategy.reduce_boolean_decision(bool(signum), all=False):
            raise Interrupted(signum or signal.SIGTERM)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time."""
        self._validation_began = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Let a signal end a long validation: the state before it is saved, and it will be done again."""
        signum = stop_signals.received()
        if signum and trainer.world_size == 1 and time.monotonic() - self._validation_began > LONG_VALIDATION:
            raise Interrupted(signum)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how long a validation takes."""
        self._validation_seconds = time.monotonic() - self._validation_began

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint, after everything that was logged before it."""
        for logger in trainer.loggers:
            getattr(logger, "sync", logger.save)()
        self._saving = True
        try:
            trainer.save_checkpoint(self.path)
        finally:
            self._saving = False
        self._saved = time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have Lightning find that the batch which is about to begin has not."""
        if self._saving and "loops" in checkpoint:
            settle_between_batches(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where there are other processes than before, count batches and steps as those would have."""
        before = checkpoint["callbacks"].get(self.state_key, {}).get("world_size", trainer.world_size)
        if "loops" not in checkpoint or before == trainer.world_size:
            return
        deal: Any = getattr(trainer.datamodule, "deal_anew", None)  # type: ignore[attr-defined]
        count_anew(checkpoint["loops"]["fit_loop"], before=before, now=trainer.world_size, done=deal and deal())
        for schedule in checkpoint["lr_schedulers"]:
            schedule.pop("base_lrs", None)  # those of another global batch
        self._dealt_anew = True

    def _before_long_validation(self, trainer: Trainer) -> bool:
        last_step = trainer.fit_loop.epoch_loop.batch_progress.current.ready + trainer.accumulate_grad_batches - 1
        every = trainer.check_val_every_n_epoch or 1
        return (
            self._validation_seconds > LONG_VALIDATION
            and bool(trainer.num_val_batches)
            and last_step >= trainer.num_training_batches
            and (trainer.current_epoch + 1) % every == 0
        )


def settle_between_batches(fit_loop: dict[str, Any]) -> None:
    """Rewrite Lightning's counts, in place, to stand between two batches.

    Within a hook its counts say how far the hook's own batch has come, and each hook is resumed in another way. Between
    batches there is one way.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    begun = int(epochs["current"]["started"] > epochs["current"]["completed"])
    batches["is_last_batch"] = False
    for progress, under_way in ((epochs, begun), (batches, 0)):
        for counts in (progress["total"], progress["current"]):
            counts["processed"] = counts["completed"]
            counts["ready"] = counts["started"] = counts["completed"] + under_way


def count_anew(fit_loop: dict[str, Any], *, before: int, now: int, done: int | None = None) -> None:
    """Rewrite how many batches of the epoch are done, in place, for another number of processes.

    Each has a batch of its own at a time. Where nobody says how many are ``done``, what does not go up evenly is left
    out.
    """
    counts = fit_loop["epoch_loop.batch_progress"]["current"]
    done = -(-counts["completed"] * before // now) if done is None else done
    counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), done))


def random_state() -> dict[str, Any]:
    """Return the states of the random number generators of Python, numpy and torch, as plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 others may draw from it
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators into the states that `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 likewise
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() and state["cuda"]:
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
