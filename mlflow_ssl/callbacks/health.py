"""Whether a training learns, collapses or diverges, without labels."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import default_collate

from mlflow_ssl.callbacks.embeddings import is_query_loader
from mlflow_ssl.callbacks.last_checkpoint import LastCheckpoint
from mlflow_ssl.datasets.bad_images import BAD_LABEL
from mlflow_ssl.datasets.sampler import EpochSampler
from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation.health import alignment, deviation_per_dimension, mean_cosine, rankme, uniformity
from mlflow_ssl.evaluation.verdict import DIVERGENCE_ADVICE, Reading, Verdict, judge

log = logging.getLogger(__name__)

CHECK_EVERY = 50
"""Batches between two looks at whether their losses are finite: each look waits for the device."""
RECENT = 20
"""Batches that a reading's loss is the mean of."""
FIRST = 5
"""Batches that the loss which a training began with is the mean of."""
NAMED_IMAGES = 8
"""Images that an error names; the others are in the log."""
CHUNK = 64
"""Images that are embedded at once for the alignment."""


class DivergedError(InputError):
    """The loss, or what was made of it, is not finite any more."""


class _Seen(NamedTuple):
    """A training batch and its loss, on the device it was computed on."""

    step: int
    epoch: int
    batch_idx: int
    loss: Tensor


class Health(Callback):
    """Measure the embeddings at each validation, and say how the training fares.

    Logs ``embedding/rankme``, which is the monitor where no image has a class, ``embedding/deviation``,
    ``embedding/mean_cosine`` and ``embedding/uniformity`` of the validation images, ``projection/deviation`` of what
    the projector makes of them, and ``embedding/agreement`` of the last training batches. What comes of it,
    `mlflow_ssl.evaluation.verdict.judge` decides; it stands in the log when it changes, and in the run's tags
    ``health`` and ``health.reason``.

    Args:
        on_collapse: ``warn`` in the log, or ``stop`` the training.
        max_images: of so many at most, taken evenly from all batches.
        monitor: the metric to improve, higher is better; by default ``val_acc`` where it is logged.
        patience: validations without improvement that make a plateau.
        loss_ceiling: loss of an image whose views are opposite, 0 being that of equal ones, as BYOL's; None where the
            loss is no such distance, and nothing is known of the agreement.
        views: training images that ``embedding/alignment`` is taken of, of the same two views each time; 0 leaves it
            out, as it takes decoding and embedding them at each validation.

    Attributes:
        verdict: the last one.
        history: a reading a validation.
        stopped: why the training was stopped; None where it was not.

    Raises:
        InputError: for a mistake in the arguments.
        DivergedError: once a loss is not finite, and before any checkpoint is written of what is not.
    """

    def __init__(
        self,
        on_collapse: str = "warn",
        max_images: int = 2048,
        monitor: str | None = None,
        patience: int = 5,
        *,
        loss_ceiling: float | None = 8.0,
        views: int = 0,
    ) -> None:
        if on_collapse not in ("warn", "stop"):
            raise InputError(f"callbacks.health.on_collapse must be warn or stop, got {on_collapse!r}")
        for name, value, lowest in (("max_images", max_images, 1), ("patience", patience, 1), ("views", views, 0)):
            if value < lowest:
                raise InputError(f"callbacks.health.{name} must be at least {lowest}, got {value}")
        if loss_ceiling is not None and not loss_ceiling > 0:
            raise InputError(f"callbacks.health.loss_ceiling must be greater than 0, got {loss_ceiling}")
        self.on_collapse = on_collapse
        self.max_images = max_images
        self.monitor = monitor
        self.patience = patience
        self.loss_ceiling = loss_ceiling
        self.views = views
        self.verdict: Verdict | None = None
        self.history: list[Reading] = []
        self.stopped: str | None = None
        self._kept: list[Tensor] = []
        self._measured: dict[str, Any] | None = None
        self._unsettled: list[_Seen] = []
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._bad: _Seen | None = None

    # what a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Return the readings so far, and the losses that the next is made of."""
        self._settle()
        return {
            "history": [asdict(reading) for reading in self.history],
            "first": list(self._first),
            "recent": list(self._recent),
            "stopped": self.stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history = [Reading(**reading) for reading in state_dict["history"]]
        self._first = list(state_dict["first"])
        self._recent = deque(state_dict["recent"], maxlen=RECENT)
        self.stopped = state_dict["stopped"]
        self.verdict = self._judged() if self.history else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have no checkpoint written of weights that are not finite."""
        self._check(trainer)
        weights = checkpoint.get("state_dict", {}).values()
        finite = [each.isfinite().all() for each in weights if isinstance(each, Tensor) and each.is_floating_point()]
        if finite and not bool(torch.stack([each.to(finite[0].device) for each in finite]).all()):
            raise DivergedError(
                _message("the weights", "NaN or infinity", f"after step {trainer.global_step}", trainer)
            )

    # losses

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss where it is, and look at a number of them now and then."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        # Lightning gives the share of an optimizer step's loss
        whole = loss.detach() * trainer.accumulate_grad_batches
        self._unsettled.append(_Seen(trainer.global_step, trainer.current_epoch, batch_idx, whole))
        if len(self._unsettled) >= CHECK_EVERY:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the losses since the last look."""
        self._check(trainer)

    def _settle(self) -> None:
        """Fetch the losses from the device, all at once, and take note of the first that is not finite."""
        if not self._unsettled:
            return
        losses = torch.stack([seen.loss.float() for seen in self._unsettled]).tolist()
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad and self._bad is None:
            self._bad = self._unsettled[bad[0]]
        self._first += losses[: max(FIRST - len(self._first), 0)]
        self._recent.extend(losses)
        self._unsettled = []

    def _check(self, trainer: Trainer) -> None:
        """Raise if a loss was not finite: in all processes together, so that none waits for another."""
        self._settle()
        if not trainer.strategy.reduce_boolean_decision(self._bad is not None, all=False):
            return
        if self._bad is None:
            raise DivergedError(_message("the loss", "NaN or infinity", "in another process", trainer))
        step, epoch, batch_idx, loss = self._bad
        paths = batch_paths(trainer, epoch, batch_idx)
        if len(paths) > NAMED_IMAGES:
            log.info("images of the batch whose loss is not finite: %s", ", ".join(paths))
        place = f"at step {step}, epoch {epoch}, batch {batch_idx}{_named(paths)}"
        raise DivergedError(_message("the loss", str(loss.item()), place, trainer))

    # embeddings

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._kept = []
        self._measured = None
        self._check(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep some of the embeddings of a batch of validation images."""
        if is_query_loader(trainer, dataloader_idx):
            batches: Any = trainer.num_val_batches
            share = -(-self.max_images // max(int(batches[dataloader_idx]), 1))
            good = outputs[batch[1] != BAD_LABEL]
            self._kept.append(good[:share].float())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the embeddings say."""
        kept, self._kept = self._kept, []
        if not kept or trainer.sanity_checking:
            return
        embeddings = torch.cat(kept)
        if not bool(embeddings.isfinite().all()):
            place = f"at step {trainer.global_step}, of validation images"
            raise DivergedError(_message("the embeddings", "NaN or infinity", place, trainer))
        measured: dict[str, Any] = {"rankme": rankme(embeddings)} if len(embeddings) else {}
        if len(embeddings) > 1:
            measured |= {
                "deviation": deviation_per_dimension(embeddings),
                "mean_cosine": mean_cosine(embeddings),
                "uniformity": uniformity(embeddings),
            }
        if trainer.state.fn == TrainerFn.FITTING and self._agreement() is not None:
            measured["agreement"] = self._agreement()
        if self.views and hasattr(getattr(trainer, "datamodule", None), "drawn_views"):
            measured["alignment"] = self._alignment(trainer, pl_module)
        for name, value in measured.items():
            pl_module.log(f"embedding/{name}", value)
        if len(embeddings) > 1:
            measured["projection_deviation"] = self._log_projections(trainer, pl_module, embeddings)
            self._measured = measured | {"dimensions": embeddings.shape[1], "num_images": len(embeddings)}

    def _log_projections(self, trainer: Trainer, pl_module: LightningModule, embeddings: Tensor) -> float | None:
        projector: Any = getattr(getattr(pl_module, "online", None), "projector", None)
        if projector is None:
            return None
        with trainer.precision_plugin.forward_context():
            projections = projector(trainer.precision_plugin.convert_input(embeddings))
        deviation = deviation_per_dimension(projections)
        pl_module.log("projection/deviation", deviation)
        return deviation

    def _agreement(self) -> float | None:
        """Return the mean cosine that the last losses come from."""
        if self.loss_ceiling is None or not self._recent:
            return None
        return 1 - 2 * self._loss() / self.loss_ceiling

    def _loss(self) -> float:
        return sum(self._recent) / len(self._recent)

    def _alignment(self, trainer: Trainer, pl_module: Any) -> float:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        views = datamodule.drawn_views()
        count = len(datamodule.augmentation_dataset)
        drawn = (views[0, row] for row in range(0, count, -(-count // self.views)))
        samples = [sample for sample in drawn if sample is not None]
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, len(samples), CHUNK):
            pair, _ = default_collate(samples[start : start + CHUNK])
            for part, images in zip(parts, pair, strict=True):
                with trainer.precision_plugin.forward_context():
                    moved = trainer.precision_plugin.convert_input(images.to(pl_module.device))
                    part.append(pl_module.embed(moved))
        return alignment(*map(torch.cat, parts))

    # the verdict

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge, when all callbacks have logged what they measured."""
        if self._measured is None:
            return
        step, measured, self._measured = trainer.global_step, self._measured, None
        # a validation that is done again, after a resume, counts once
        self.history = [reading for reading in self.history if reading.step < step]
        self.history.append(
            Reading(
                step=step,
                epoch=trainer.current_epoch,
                loss=self._loss() if self._recent else None,
                monitor=self._monitored(trainer),
                **{name: value for name, value in measured.items() if name not in ("uniformity", "alignment")},
            )
        )
        before, self.verdict = self.verdict, self._judged()
        if before is None or before.state != self.verdict.state:
            self._say(trainer, self.verdict)
        alarmed = self.verdict.state in ("collapsing", "diverging") and self.on_collapse == "stop"
        if trainer.strategy.reduce_boolean_decision(alarmed, all=False):
            self.stopped = str(self.verdict)
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.warning("the training is stopped at step %d, since callbacks.health.on_collapse is stop", step)

    def _judged(self) -> Verdict:
        start_loss = sum(self._first) / len(self._first) if self._first else None
        return judge(self.history, start_loss=start_loss, patience=self.patience)

    def _monitored(self, trainer: Trainer) -> float | None:
        metrics = trainer.callback_metrics
        if self.monitor is not None and self.monitor not in metrics and trainer.state.fn == TrainerFn.FITTING:
            raise InputError(
                f"callbacks.health.monitor must be a metric that is logged, got {self.monitor!r}; logged are "
                f"{', '.join(sorted(metrics))}"
            )
        value = metrics.get(self.monitor or "val_acc")
        return None if value is None else float(value)

    def _say(self, trainer: Trainer, verdict: Verdict) -> None:
        """Say a new state in the log, and on the run's page."""
        if not trainer.is_global_zero:
            return
        level = logging.WARNING if verdict.state in ("collapsing", "diverging") else logging.INFO
        log.log(level, "step %d: the training is %s", trainer.global_step, _as_words(verdict))
        run: Any = getattr(trainer.logger, "run", None)
        if hasattr(run, "set_tags"):
            run.set_tags({"health": verdict.state, "health.reason": verdict.reason})


def batch_paths(trainer: Trainer, epoch: int, batch_idx: int) -> list[str]:
    """Return the relative paths of the images that a training batch of this process was asked for, in its order.

    They follow from seed, epoch and batch alone, with workers and without, also after a resume. An image that could not
    be read is among them, though `datamodule.on_bad_image` had it left out or replaced. Images that are streamed from
    shards, or do not come from one of our datamodules, are not known: there are none.
    """
    loader: Any = trainer.train_dataloader
    index: Any = getattr(getattr(trainer, "datamodule", None), "index", None)
    sampler = getattr(loader, "sampler", None)
    if index is None or not isinstance(sampler, EpochSampler):
        return []
    whole = EpochSampler(sampler.num_images, seed=sampler.seed, rank=sampler.rank, world_size=sampler.world_size)
    whole.set_epoch(epoch)
    begins = batch_idx * loader.batch_size
    rows = [row for _, row in islice(whole, begins, begins + loader.batch_size)]
    table = index.split("train").table
    return [str(path) for path in table["path"].take(rows).to_pylist()]


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


def _message(name: str, value: str, place: str, trainer: Trainer) -> str:
    checkpoint = last_checkpoint(trainer)
    good = "no checkpoint was written before" if checkpoint is None else f"the last good checkpoint is {checkpoint}"
    return f"{name} must be finite, got {value} {place}; {DIVERGENCE_ADVICE}; {good}"


def _named(paths: list[str]) -> str:
    if not paths:
        return ""
    more = f" and {len(paths) - NAMED_IMAGES} more" if len(paths) > NAMED_IMAGES else ""
    return f" ({', '.join(paths[:NAMED_IMAGES])}{more})"


def _as_words(verdict: Verdict) -> str:
    return str(verdict).replace("plateau:", "on a plateau:", 1)
