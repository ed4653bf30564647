"""Losses that are watched, and the end of a training whose numbers are not finite any more."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from mlflow_ssl.callbacks.last_checkpoint import LastCheckpoint
from mlflow_ssl.datasets.sampler import EpochSampler
from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation.verdict import DIVERGENCE_ADVICE
from mlflow_ssl.processes import averaged

log = logging.getLogger(__name__)

CHECK_EVERY = 50
"""Batches between two looks at whether their losses are finite: each look waits for the device."""
RECENT = 20
"""Batches that a reading's loss is the mean of."""
FIRST = 5
"""Batches that the loss which a training began with is the mean of."""
NAMED_IMAGES = 8
"""Images that an error names; the others are in the log."""


class DivergedError(InputError):
    """The loss, or what was made of it, is not finite any more."""


class _Seen(NamedTuple):
    """A training batch and its loss, on the device it was computed on."""

    step: int
    epoch: int
    batch_idx: int
    loss: Tensor


class LossWatch:
    """Keep the losses of a training, and raise when one is not finite.

    A loss stays on its device until a number of them is fetched at once, by all processes together. The means are of
    the losses of all processes; one that is not finite is this process's own.
    """

    def __init__(self) -> None:
        self._unsettled: list[_Seen] = []
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._bad: _Seen | None = None

    @property
    def start(self) -> float | None:
        """Mean loss of the first batches of the training; None before them."""
        return sum(self._first) / len(self._first) if self._first else None

    @property
    def recent(self) -> float | None:
        """Mean loss of the last batches; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def state_dict(self) -> dict[str, list[float]]:
        """Return the losses that the two means are of."""
        self._settle()
        return {"first": list(self._first), "recent": list(self._recent)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._first = list(state_dict["first"])
        self._recent = deque(state_dict["recent"], maxlen=RECENT)

    def add(self, trainer: Trainer, outputs: Any, batch_idx: int) -> None:
        """Keep the loss of a training batch where it is, and look at a number of them now and then."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        # Lightning gives the share of an optimizer step's loss
        whole = loss.detach() * trainer.accumulate_grad_batches
        self._unsettled.append(_Seen(trainer.global_step, trainer.current_epoch, batch_idx, whole))
        if len(self._unsettled) >= CHECK_EVERY:
            self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Look at the losses since the last look, in all processes together, so that none waits for another.

        Raises:
            DivergedError: if one was not finite.
        """
        self._settle()
        if not trainer.strategy.reduce_boolean_decision(self._bad is not None, all=False):
            return
        if self._bad is None:
            raise diverged("the loss", "NaN or infinity", "in another process", trainer)
        step, epoch, batch_idx, loss = self._bad
        paths = batch_paths(trainer, epoch, batch_idx)
        if len(paths) > NAMED_IMAGES:
            log.info("images of the batch whose loss is not finite: %s", ", ".join(paths))
        place = f"at step {step}, epoch {epoch}, batch {batch_idx}{_named(paths)}"
        raise diverged("the loss", str(loss.item()), place, trainer)

    def _settle(self) -> None:
        """Fetch the losses from the device, all at once, and take note of the first that is not finite."""
        if not self._unsettled:
            return
        own = torch.stack([seen.loss.float() for seen in self._unsettled])
        own_losses, losses = torch.stack([own, averaged(own)]).tolist()
        bad = [number for number, loss in enumerate(own_losses) if not math.isfinite(loss)]
        if bad and self._bad is None:
            self._bad = self._unsettled[bad[0]]
        self._first += losses[: max(FIRST - len(self._first), 0)]
        self._recent.extend(losses)
        self._unsettled = []


def check_weights(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Have no checkpoint written of weights that are not finite.

    The processes decide together: where they share the weights, only the first has them.

    Raises:
        DivergedError: if there are such.
    """
    weights = checkpoint.get("state_dict", {}).values()
    finite = [each.isfinite().all() for each in weights if isinstance(each, Tensor) and each.is_floating_point()]
    bad = bool(finite) and not bool(torch.stack([each.to(finite[0].device) for each in finite]).all())
    if trainer.strategy.reduce_boolean_decision(bad, all=False):
        raise diverged("the weights", "NaN or infinity", f"after step {trainer.global_step}", trainer)


def diverged(name: str, value: str, place: str, trainer: Trainer) -> DivergedError:
    """Return the error that says what is not finite and where, what to change, and where to go on."""
    checkpoint = last_checkpoint(trainer)
    good = "no checkpoint was written before" if checkpoint is None else f"the last good checkpoint is {checkpoint}"
    return DivergedError(f"{name} must be finite, got {value} {place}; {DIVERGENCE_ADVICE}; {good}")


def batch_paths(trainer: Trainer, epoch: int, batch_idx: int) -> list[str]:
    """Return the relative paths of the images that a training batch of this process was asked for, in its order.

    They follow from seed, epoch and batch alone, with workers and without, also after a resume. An image that could not
    be read is among them, though `datamodule.on_bad_image` had it left out or replaced. Images that are streamed from
    shards, or do not come from one of our datamodules, are not known: there are none.
    """
    loader: Any = trainer.train_dataloader
    datamodule: Any = getattr(trainer, "datamodule", None)
    sampler = getattr(loader, "sampler", None)
    if not hasattr(datamodule, "images_of") or not isinstance(sampler, EpochSampler):
        return []
    whole = EpochSampler(sampler.num_images, seed=sampler.seed, rank=sampler.rank, world_size=sampler.world_size)
    whole.set_epoch(epoch)
    begins = batch_idx * loader.batch_size
    rows = [row for _, row in islice(whole, begins, begins + loader.batch_size)]
    return [str(path) for path in datamodule.images_of("train").take(np.array(rows)).paths]


def last_checkpoint(trainer: Trainer) -> Path | None:
    """Return the checkpoint of this training that was written last; None if there is none."""
    files: list[Path] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LastCheckpoint):
            files.append(callback.path)
        elif isinstance(callback, ModelCheckpoint):
            files += [Path(path) for path in (callback.last_model_path, callback.best_model_path) if path]
    there = [file for file in files if file.is_file()]
    return max(there, key=lambda file: file.stat().st_mtime_ns) if there else None


def _named(paths: list[str]) -> str:
    if not paths:
        return ""
    more = f" and {len(paths) - NAMED_IMAGES} more" if len(paths) > NAMED_IMAGES else ""
    return f" ({', '.join(paths[:NAMED_IMAGES])}{more})"
