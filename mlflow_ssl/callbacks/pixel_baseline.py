"""How far the pixels alone get: what an embedding has to beat."""

import math
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from mlflow_ssl.callbacks.embeddings import Embeddings, batch_rows, has_bank
from mlflow_ssl.callbacks.sharing import shared_nearest
from mlflow_ssl.evaluation.knn import accuracy, vote
from mlflow_ssl.processes import joined


class PixelBaseline(Callback):
    """Log ``baseline_acc_pixels`` once before training: the same vote as ``val_acc``, on raw pixels.

    Args:
        num_neighbours: how many vote.
    """

    def __init__(self, num_neighbours: int = 20) -> None:
        self.num_neighbours = num_neighbours
        self._pixels = Embeddings()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch of pixels."""
        if trainer.state.fn == TrainerFn.VALIDATING and has_bank(trainer):
            images, labels = batch
            self._pixels.add(dataloader_idx, images.flatten(1), labels, batch_rows(trainer, dataloader_idx, batch_idx))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy of the pixels."""
        if trainer.state.fn == TrainerFn.VALIDATING and has_bank(trainer):
            device = pl_module.device
            bank, queries = self._pixels.take()
            queries = queries.of_all_processes(device)
            rows, order = joined(bank.rows, device).sort()
            found = shared_nearest(queries, bank, rows, self.num_neighbours, device=device)
            labels = joined(bank.labels, device)[order]
            right = accuracy(vote(found, labels).majority, queries.labels) if trainer.is_global_zero else math.nan
            pl_module.log("baseline_acc_pixels", trainer.strategy.broadcast(right))
