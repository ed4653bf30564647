"""Accuracy of the nearest neighbours, before, during and after training."""

import logging
import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from mlflow_ssl.callbacks.embeddings import (
    Embeddings,
    Evaluated,
    Gathered,
    batch_rows,
    has_bank,
    have_last_epoch_validated,
)
from mlflow_ssl.callbacks.sharing import shared_nearest
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.evaluation.knn import accuracy, vote
from mlflow_ssl.evaluation.linear import linear_accuracy
from mlflow_ssl.processes import joined

log = logging.getLogger(__name__)


class KNNEvaluation(Callback):
    """Log ``val_acc`` and ``val_acc_weighted`` at each validation, ``test_acc*`` at the test.

    The bank is the training images through the validation transform, embedded by the online backbone in evaluation
    mode. The last epoch is always validated. At the test, a linear classifier on the same embeddings gives
    ``test_acc_linear``.

    Args:
        num_neighbours: how many vote.
        temperature: of the weighted vote.
        max_bank: of so many training images at most, chosen by the datamodule's seed; which are, stands in the log and
            in the run's tag ``data.bank``. None takes all.

    Raises:
        ValueError: if ``max_bank`` is less than ``num_neighbours``.

    Attributes:
        evaluated: what the last evaluation was made of, for other callbacks to look at until the next stage begins; in
            the first process only.
    """

    def __init__(self, num_neighbours: int = 20, temperature: float = 0.1, max_bank: int | None = None) -> None:
        if max_bank is not None and max_bank < num_neighbours:
            raise ValueError(f"max_bank must be at least num_neighbours {num_neighbours}, got {max_bank}")
        self.num_neighbours = num_neighbours
        self.temperature = temperature
        self.max_bank = max_bank
        self._embeddings = Embeddings()
        self._val_acc: float | None = None
        self._bank_words: str | None = None
        self.evaluated: Evaluated | None = None

    def state_dict(self) -> dict[str, Any]:
        """Have each checkpoint know its own ``val_acc``, whatever metric it was chosen by."""
        return {"val_acc": self._val_acc}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._val_acc = state_dict["val_acc"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bound the bank before its images are loaded, and say so."""
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, SSLDataModule):
            return
        words = datamodule.bound_bank(self.max_bank)
        if words is None or words == self._bank_words or not trainer.is_global_zero:
            return
        self._bank_words = words
        log.info("neighbours are looked for among %s", words)
        run: Any = getattr(trainer.logger, "run", None)
        if hasattr(run, "set_tags"):
            run.set_tags({"data.bank": words})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the last epoch validated, whatever ``check_val_every_n_epoch`` divides, also if resumed within it."""
        self.evaluated = None
        have_last_epoch_validated(trainer)

    on_train_epoch_start = on_train_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the memory of the last evaluation free for this one."""
        self.evaluated = None

    on_test_start = on_validation_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the last validation of a training: the best weights, which come next, are others."""
        if stage == "fit":
            self.evaluated = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch of embeddings."""
        if has_bank(trainer):
            rows = batch_rows(trainer, dataloader_idx, batch_idx)
            self._embeddings.add(dataloader_idx, outputs, batch[1], rows)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy on the validation split."""
        if not has_bank(trainer):
            return
        bank, queries = self._embeddings.take()
        if not trainer.sanity_checking:  # a few batches are no bank
            self._evaluate(pl_module.device, bank, queries)
            self._val_acc = self._log_votes(trainer, pl_module, "val_acc")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy on the test split, of neighbours and of a linear classifier."""
        if not has_bank(trainer):
            return
        self._evaluate(pl_module.device, *self._embeddings.take())
        self._log_votes(trainer, pl_module, "test_acc")
        linear, kept = math.nan, self.evaluated
        if kept:
            linear = linear_accuracy(kept.bank, kept.labels, kept.queries, kept.truth)
        pl_module.log("test_acc_linear", trainer.strategy.broadcast(linear))

    def _evaluate(self, device: torch.device, bank: Gathered, queries: Gathered) -> None:
        """Gather what the processes have, and vote, in the first process."""
        queries = queries.of_all_processes(device)
        rows = joined(bank.rows, device).sort().values
        found = shared_nearest(queries, bank, rows, self.num_neighbours, device=device)
        bank = bank.of_all_processes(device, everywhere=False)
        if not len(bank.rows):
            return
        votes = vote(found, bank.labels, temperature=self.temperature)
        self.evaluated = Evaluated(
            bank.embeddings,
            bank.labels,
            queries.embeddings,
            queries.labels,
            votes.majority,
            votes.weighted,
            bank_rows=bank.rows,
            query_rows=queries.rows,
        )

    def _log_votes(self, trainer: Trainer, pl_module: LightningModule, name: str) -> float:
        """Log the accuracies, the same in all processes."""
        majority, weighted, kept = math.nan, math.nan, self.evaluated
        if kept:
            majority, weighted = (accuracy(votes, kept.truth) for votes in (kept.predicted, kept.predicted_weighted))
        majority, weighted = trainer.strategy.broadcast((majority, weighted))
        pl_module.log(name, majority, prog_bar=True)
        pl_module.log(f"{name}_weighted", weighted)
        return majority
