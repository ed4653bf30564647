"""Embeddings gathered over the batches of an evaluation, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from mlflow_ssl.datasets.bad_images import BAD_LABEL


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation was made of, on the host, in the order of the datamodule's images.

    Attributes:
        bank: embeddings, shape ``(N, D)``.
        labels: class of each bank entry, shape ``(N,)``.
        queries: embeddings, shape ``(Q, D)``.
        truth: class of each query, shape ``(Q,)``.
        predicted: class by the majority of its neighbours, shape ``(Q,)``.
        bank_rows: number of each bank entry among the datamodule's bank images, shape ``(N,)``.
        query_rows: likewise, of each query among its validation images, shape ``(Q,)``.
    """

    bank: Tensor
    labels: Tensor
    queries: Tensor
    truth: Tensor
    predicted: Tensor
    bank_rows: Tensor
    query_rows: Tensor


class Gathered(NamedTuple):
    """Embeddings ``(N, D)`` and classes ``(N,)`` of images, and their numbers ``(N,)`` in the order of the loader."""

    embeddings: Tensor
    labels: Tensor
    rows: Tensor


@dataclass
class Embeddings:
    """Embeddings and labels of the images of each loader: bank (0) and queries (1)."""

    parts: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, loader: int, embeddings: Tensor, labels: Tensor) -> None:
        """Keep one batch, in float32 on the host."""
        self.parts.setdefault(loader, []).append((embeddings.float().cpu(), labels.cpu()))

    def take(self) -> tuple[Gathered, Gathered]:
        """Return bank and queries without the images that could not be read, and forget them."""
        bank, queries = (_gather(self.parts[loader]) for loader in (0, 1))
        self.parts = {}
        return bank, queries


def _gather(parts: Sequence[tuple[Tensor, Tensor]]) -> Gathered:
    embeddings, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    rows = torch.nonzero(labels != BAD_LABEL).flatten()
    return Gathered(embeddings[rows], labels[rows], rows)


def has_bank(trainer: Trainer) -> bool:
    """Return whether the trainer's evaluation has a bank beside its queries: where no image has a class it has not."""
    return _num_loaders(trainer) > 1


def is_query_loader(trainer: Trainer, loader: int) -> bool:
    """Return whether a loader of the evaluation is that of the queries: the last."""
    return loader == _num_loaders(trainer) - 1


def _num_loaders(trainer: Trainer) -> int:
    loaders: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return len(loaders) if isinstance(loaders, list) else 1
