"""How far the backbone gets as it is: what finetuning has to beat."""

import math
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from mlflow_ssl.callbacks.embeddings import Embeddings, Gathered, batch_rows, dealt_rows
from mlflow_ssl.datamodules import LabelledDataModule
from mlflow_ssl.evaluation.knn import accuracy, knn_predict
from mlflow_ssl.evaluation.linear import linear_accuracy


class BackboneBaseline(Callback):
    """Log ``baseline_acc_knn`` and ``baseline_acc_linear`` of the validation images once, before training.

    The first is the vote of the nearest training images, the second that of a linear classifier fitted to its optimum,
    both on the embeddings of the untouched backbone.

    Args:
        num_neighbours: how many vote; of fewer training images all do.
    """

    def __init__(self, num_neighbours: int = 20) -> None:
        self.num_neighbours = num_neighbours
        self._queries = Embeddings()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch of embeddings."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._queries.add(dataloader_idx, outputs, batch[1], batch_rows(trainer, dataloader_idx, batch_idx))

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Embed the training images, and log both accuracies."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if trainer.state.fn != TrainerFn.VALIDATING or not isinstance(datamodule, LabelledDataModule):
            return
        parts, precision = Embeddings(), trainer.precision_plugin
        loader: Any = datamodule.clean_train_dataloader()
        for batch_idx, (images, labels) in enumerate(loader):
            with precision.forward_context():
                embeddings = pl_module.embed(precision.convert_input(images.to(pl_module.device)))
            parts.add(0, embeddings, labels, dealt_rows(loader.batch_sampler, batch_idx))
        bank, queries = (
            part.take_one(0).of_all_processes(pl_module.device, everywhere=False) for part in (parts, self._queries)
        )
        knn, linear = self._accuracies(bank, queries) if trainer.is_global_zero else (math.nan, math.nan)
        knn, linear = trainer.strategy.broadcast((knn, linear))
        pl_module.log("baseline_acc_knn", knn)
        pl_module.log("baseline_acc_linear", linear)

    def _accuracies(self, bank: Gathered, queries: Gathered) -> tuple[float, float]:
        """Return those of the neighbours and of the linear classifier."""
        votes = knn_predict(
            queries.embeddings,
            bank.embeddings,
            bank.labels,
            num_neighbours=min(self.num_neighbours, len(bank.labels)),
        )
        linear = linear_accuracy(bank.embeddings, bank.labels, queries.embeddings, queries.labels)
        return accuracy(votes.majority, queries.labels), linear
