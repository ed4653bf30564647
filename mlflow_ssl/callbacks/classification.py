"""How well a classifier classifies, during and after training."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from mlflow_ssl.callbacks.embeddings import Embeddings, Gathered, batch_rows, have_last_epoch_validated
from mlflow_ssl.evaluation.confusion import confusion_matrix, macro_f1
from mlflow_ssl.methods import Classifier


@dataclass(frozen=True)
class Classified:
    """What an evaluation found, on the host, in the order of the loader's images.

    Attributes:
        rows: number of each image that could be read, shape ``(N,)``.
        truth: its class, shape ``(N,)``.
        predicted: what it was taken for, shape ``(N,)``.
    """

    rows: Tensor
    truth: Tensor
    predicted: Tensor


class ClassificationEvaluation(Callback):
    """Log ``val_acc``, ``val_f1`` (the mean over classes) and ``val_loss``, and likewise ``test_*``.

    The logits are those of clean embeddings in float32, as the exported network gives them. The loss is the plain
    cross entropy, without weights of classes and smoothing. The last epoch is always validated.

    Attributes:
        evaluated: what the last evaluation found.
    """

    def __init__(self) -> None:
        self._embeddings = Embeddings()
        self._val_acc: float | None = None
        self.evaluated: Classified | None = None

    def state_dict(self) -> dict[str, Any]:
        """Have each checkpoint know its own ``val_acc``, whatever metric it was chosen by."""
        return {"val_acc": self._val_acc}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._val_acc = state_dict["val_acc"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Have the last epoch validated, also if resumed within it."""
        have_last_epoch_validated(trainer)

    on_train_epoch_start = on_train_start

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
        self._embeddings.add(dataloader_idx, outputs, batch[1], batch_rows(trainer, dataloader_idx, batch_idx))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log how the validation images are classified."""
        val_acc = self._log(pl_module, "val")
        if not trainer.sanity_checking:
            self._val_acc = val_acc

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log how the test images are classified."""
        self._log(pl_module, "test")

    @torch.no_grad()
    def _log(self, method: Classifier, split: str) -> float:
        (own,) = self._embeddings.take()
        with torch.autocast(method.device.type, enabled=False):
            classified = method.classify(own.embeddings.to(method.device)).cpu()
        images = Gathered(classified, own.labels, own.rows).of_all_processes(method.device)
        logits = images.embeddings
        predicted = logits.argmax(1)
        self.evaluated = Classified(images.rows, images.labels, predicted)
        accuracy = float((predicted == images.labels).double().mean())
        confusion = confusion_matrix(images.labels, predicted, num_classes=logits.shape[1])
        method.log(f"{split}_acc", accuracy, prog_bar=True)
        method.log(f"{split}_f1", macro_f1(confusion))
        method.log(f"{split}_loss", float(F.cross_entropy(logits, images.labels)))
        return accuracy
