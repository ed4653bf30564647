"""How far the backbone gets as it is: what finetuning has to beat."""

from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from mlflow_ssl.callbacks.embeddings import Embeddings
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
            self._queries.add(dataloader_idx, outputs, batch[1])

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Embed the training images, and log both accuracies."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if trainer.state.fn != TrainerFn.VALIDATING or not isinstance(datamodule, LabelledDataModule):
            return
        (queries,) = self._queries.take()
        parts, precision = Embeddings(), trainer.precision_plugin
        for images, labels in datamodule.clean_train_dataloader():
            with precision.forward_context():
                parts.add(0, pl_module.embed(precision.convert_input(images.to(pl_module.device))), labels)
        (bank,) = parts.take()
        votes = knn_predict(
            queries.embeddings,
            bank.embeddings,
            bank.labels,
            num_neighbours=min(self.num_neighbours, len(bank.labels)),
        )
        linear = linear_accuracy(bank.embeddings, bank.labels, queries.embeddings, queries.labels)
        pl_module.log("baseline_acc_knn", accuracy(votes.majority, queries.labels))
        pl_module.log("baseline_acc_linear", linear)
