"""Embeddings gathered over the batches of an evaluation, and what came of it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation was made of, on the host, in the order of the datamodule's images.

    Attributes:
        bank: embeddings, shape ``(N, D)``.
        labels: class of each bank entry, shape ``(N,)``.
        queries: embeddings, shape ``(Q, D)``.
        truth: class of each query, shape ``(Q,)``.
        predicted: class by the majority of its neighbours, shape ``(Q,)``.
    """

    bank: Tensor
    labels: Tensor
    queries: Tensor
    truth: Tensor
    predicted: Tensor


@dataclass
class Embeddings:
    """Embeddings and labels of bank (loader 0) and queries (loader 1)."""

    parts: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: {0: [], 1: []})

    def add(self, loader: int, embeddings: Tensor, labels: Tensor) -> None:
        """Keep one batch, in float32 on the host."""
        self.parts[loader].append((embeddings.float().cpu(), labels.cpu()))

    def take(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return bank ``(N, D)``, its labels ``(N,)``, queries ``(Q, D)``, theirs ``(Q,)``, and forget them."""
        (bank, bank_labels), (queries, query_labels) = (
            (torch.cat([e for e, _ in part]), torch.cat([label for _, label in part])) for part in self.parts.values()
        )
        self.parts = {0: [], 1: []}
        return bank, bank_labels, queries, query_labels
