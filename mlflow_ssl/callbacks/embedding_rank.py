"""Whether embeddings spread or collapse, without labels."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mlflow_ssl.callbacks.embeddings import is_query_loader
from mlflow_ssl.datasets.bad_images import BAD_LABEL
from mlflow_ssl.evaluation.health import deviation_per_dimension, mean_cosine, rankme, uniformity


class EmbeddingRank(Callback):
    """Log what the embeddings of the validation images say of themselves, at each validation.

    ``embedding/rankme`` is the monitor where no image has a class; ``embedding/deviation`` near 0 and
    ``embedding/mean_cosine`` near 1 tell a collapse; ``embedding/uniformity`` falls as they spread.

    Args:
        max_images: of so many at most, taken evenly from all batches.
    """

    def __init__(self, max_images: int = 2048) -> None:
        if max_images < 1:
            raise ValueError(f"max_images must be at least 1, got {max_images}")
        self.max_images = max_images
        self._kept: list[Tensor] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._kept = []

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
        """Log rank and spread; the spread of one image is none."""
        kept, self._kept = self._kept, []
        if not kept or trainer.sanity_checking:
            return
        embeddings = torch.cat(kept)
        pl_module.log("embedding/rankme", rankme(embeddings))
        if len(embeddings) > 1:
            pl_module.log("embedding/deviation", deviation_per_dimension(embeddings))
            pl_module.log("embedding/mean_cosine", mean_cosine(embeddings))
            pl_module.log("embedding/uniformity", uniformity(embeddings))
