"""Whether a training learns, collapses or diverges, without labels."""

import logging
from dataclasses import asdict
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import default_collate

from mlflow_ssl.batchnorm import has_plain_batchnorm
from mlflow_ssl.callbacks.divergence import LossWatch, check_weights, diverged
from mlflow_ssl.callbacks.embeddings import Embeddings, batch_number, batch_rows, is_query_loader, num_batches
from mlflow_ssl.callbacks.monitors import check_monitor
from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation.health import alignment, deviation_per_dimension, mean_cosine, rankme, uniformity
from mlflow_ssl.evaluation.verdict import Reading, Verdict, judge

log = logging.getLogger(__name__)

CHUNK = 64
"""Images that are embedded at once for the alignment."""


class Health(Callback):
    """Measure the embeddings at each validation, and say how the training fares.

    Logs ``embedding/rankme``, which is the monitor where no image has a class, ``embedding/deviation``,
    ``embedding/mean_cosine`` and ``embedding/uniformity`` of the validation images, ``projection/deviation`` of what
    the projector makes of them, and ``embedding/agreement`` of the last training batches. What comes of it,
    `mlflow_ssl.evaluation.verdict.judge` decides; it stands in the log when it changes, and in the run's tags
    ``health`` and ``health.reason``.

    Args:
        on_collapse: ``warn`` in the log, or ``stop`` the training.
        max_images: of so many at most, taken evenly from all batches; 0 measures none, and looks after the loss alone.
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
        for name, value, lowest in (("max_images", max_images, 0), ("patience", patience, 1), ("views", views, 0)):
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
        self._kept = Embeddings()
        self._measured: dict[str, Any] | None = None
        self._losses = LossWatch()
        self._separate_batchnorm = False

    # what a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Return the readings so far, and the losses that the next is made of."""
        return {
            "history": [asdict(reading) for reading in self.history],
            "stopped": self.stopped,
            **self._losses.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history = [Reading(**reading) for reading in state_dict["history"]]
        self._losses.load_state_dict(state_dict)
        self.stopped = state_dict["stopped"]
        self.verdict = self._judged() if self.history else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have no checkpoint written of weights that are not finite."""
        self._losses.check(trainer)
        check_weights(trainer, checkpoint)

    # losses

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss where it is, and look at a number of them now and then."""
        self._losses.add(trainer, outputs, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the losses since the last look."""
        self._losses.check(trainer)

    # embeddings

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._kept = Embeddings()
        self._measured = None
        self._losses.check(trainer)

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
            batches = num_batches(trainer, dataloader_idx)
            share = even_share(self.max_images, batches, batch_number(trainer, dataloader_idx, batch_idx))
            self._kept.add(0, outputs, batch[1], batch_rows(trainer, dataloader_idx, batch_idx), most=share)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the embeddings say."""
        kept, self._kept = self._kept, Embeddings()
        if not kept.parts or trainer.sanity_checking:
            return
        embeddings = kept.take_one(0).of_all_processes(pl_module.device).embeddings.to(pl_module.device)
        if not bool(embeddings.isfinite().all()):
            place = f"at step {trainer.global_step}, of validation images"
            raise diverged("the embeddings", "NaN or infinity", place, trainer)
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
        loss = self._losses.recent
        return None if self.loss_ceiling is None or loss is None else 1 - 2 * loss / self.loss_ceiling

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
                loss=self._losses.recent,
                monitor=self._monitored(trainer),
                **{name: value for name, value in measured.items() if name not in ("uniformity", "alignment")},
            )
        )
        self._separate_batchnorm = trainer.world_size > 1 and has_plain_batchnorm(pl_module)
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
        return judge(
            self.history,
            start_loss=self._losses.start,
            patience=self.patience,
            separate_batchnorm=self._separate_batchnorm,
        )

    def _monitored(self, trainer: Trainer) -> float | None:
        metrics = trainer.callback_metrics
        if self.monitor is not None and trainer.state.fn == TrainerFn.FITTING:
            check_monitor("callbacks.health.monitor", self.monitor, metrics)
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


def even_share(total: int, num_batches: int, batch_idx: int) -> int:
    """Return how many images a batch gives, so that all give about as many, and ``total`` together.

    Example:
        >>> [even_share(7, 3, batch_idx) for batch_idx in range(3)]
        [2, 2, 3]
    """
    return total * (batch_idx + 1) // num_batches - total * batch_idx // num_batches


def _as_words(verdict: Verdict) -> str:
    return str(verdict).replace("plateau:", "on a plateau:", 1)
