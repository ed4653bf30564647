"""How far the pixels alone get: what an embedding has to beat."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from mlflow_ssl.callbacks.embeddings import Embeddings, has_bank
from mlflow_ssl.evaluation.knn import accuracy, knn_predict


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
            self._pixels.add(dataloader_idx, images.flatten(1), labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy of the pixels."""
        if trainer.state.fn == TrainerFn.VALIDATING and has_bank(trainer):
            bank, queries = self._pixels.take()
            votes = knn_predict(queries.embeddings, bank.embeddings, bank.labels, num_neighbours=self.num_neighbours)
            pl_module.log("baseline_acc_pixels", accuracy(votes.majority, queries.labels))
