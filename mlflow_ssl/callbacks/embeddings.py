"""Embeddings gathered over the batches of an evaluation, and what came of it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from mlflow_ssl.datasets.bad_images import BAD_LABEL
from mlflow_ssl.datasets.sampler import DealtBatches
from mlflow_ssl.processes import joined, rank_and_world_size


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation of all processes was made of, on the host, in the order of the datamodule's images.

    Attributes:
        bank: embeddings, shape ``(N, D)``.
        labels: class of each bank entry, shape ``(N,)``.
        queries: embeddings, shape ``(Q, D)``.
        truth: class of each query, shape ``(Q,)``.
        predicted: class by the majority of its neighbours, shape ``(Q,)``.
        predicted_weighted: likewise, of votes weighted by similarity.
        bank_rows: number of each bank entry among the datamodule's bank images, shape ``(N,)``.
        query_rows: likewise, of each query among its validation images, shape ``(Q,)``.
    """

    bank: Tensor
    labels: Tensor
    queries: Tensor
    truth: Tensor
    predicted: Tensor
    predicted_weighted: Tensor
    bank_rows: Tensor
    query_rows: Tensor


class Gathered(NamedTuple):
    """Embeddings ``(N, D)`` and classes ``(N,)`` of images, and their numbers ``(N,)`` in the order of the data set."""

    embeddings: Tensor
    labels: Tensor
    rows: Tensor

    def of_all_processes(self, device: torch.device, *, everywhere: bool = True) -> "Gathered":
        """Return the images of all processes, in the order of the data set; see `mlflow_ssl.processes.joined`."""
        if rank_and_world_size()[1] == 1:
            return self
        parts = Gathered(*(joined(part, device, everywhere=everywhere) for part in self))
        order = parts.rows.argsort()
        return Gathered(*(part[order] for part in parts))


@dataclass
class Embeddings:
    """Embeddings and labels of this process's images of each loader: bank and queries, or those of the only one."""

    parts: dict[int, list[Gathered]] = field(default_factory=dict)
    _seen: dict[int, int] = field(default_factory=dict)

    def add(
        self, loader: int, embeddings: Tensor, labels: Tensor, rows: Tensor | None = None, *, most: int | None = None
    ) -> None:
        """Keep what counts of one batch, in float32 on the host.

        Args:
            loader: 0 or 1.
            embeddings: shape ``(B, D)``.
            labels: shape ``(B,)``.
            rows: from `batch_rows`.
            most: only the first so many are kept; None keeps all.
        """
        seen = self._seen.get(loader, 0)
        self._seen[loader] = seen + len(labels)
        rows = torch.arange(seen, seen + len(labels)) if rows is None else rows
        kept = counting(labels.cpu(), rows).nonzero().flatten()[:most]
        batch = Gathered(embeddings[kept.to(embeddings.device)].float().cpu(), labels.cpu()[kept], rows[kept])
        self.parts.setdefault(loader, []).append(batch)

    def take(self) -> tuple[Gathered, ...]:
        """Return this process's images of each loader, without those that could not be read, and forget them."""
        return tuple(self.take_one(loader) for loader in sorted(self.parts))

    def take_one(self, loader: int) -> Gathered:
        """Return and forget this process's images of one loader."""
        self._seen.pop(loader)
        return Gathered(*map(torch.cat, zip(*self.parts.pop(loader), strict=True)))


def batch_rows(trainer: Trainer, loader: int, batch_idx: int) -> Tensor | None:
    """Return the number of each image of a batch in the order of its data set, -1 where the batch is borrowed.

    None says that the loader is not one of our datamodules', and its batches come in the order of the images.
    """
    dealt = _dealt(trainer, loader)
    return None if dealt is None else dealt_rows(dealt, batch_idx)


def dealt_rows(dealt: DealtBatches, batch_idx: int) -> Tensor:
    """Return the number of each image of a batch, -1 where the batch is borrowed."""
    rows = torch.tensor(dealt.rows(batch_idx))
    return torch.full_like(rows, -1) if dealt.borrowed else rows


def batch_number(trainer: Trainer, loader: int, batch_idx: int) -> int:
    """Return the number of a batch of this process among those of all."""
    dealt = _dealt(trainer, loader)
    return batch_idx if dealt is None else dealt.number(batch_idx)


def num_batches(trainer: Trainer, loader: int) -> int:
    """Return how many batches of a validation loader all processes evaluate together."""
    dealt, batches = _dealt(trainer, loader), cast(list[int], trainer.num_val_batches)
    own = int(batches[loader])
    if dealt is None:
        return own
    whole = own == len(dealt)  # not so where trainer.limit_val_batches leaves out some
    return dealt.num_batches if whole else min(own * trainer.world_size, dealt.num_batches)


def counting(labels: Tensor, rows: Tensor | None) -> Tensor:
    """Return which images of a batch count, ``(B,)``: those that could be read, unless the batch is borrowed."""
    good = labels != BAD_LABEL
    return good if rows is None else good & (rows.to(labels.device) >= 0)


def have_last_epoch_validated(trainer: Trainer) -> None:
    """Have the epoch that begins validated if it is the last, whatever ``check_val_every_n_epoch`` divides."""
    if trainer.current_epoch + 1 == trainer.max_epochs:
        trainer.check_val_every_n_epoch = 1


def has_bank(trainer: Trainer) -> bool:
    """Return whether the trainer's evaluation has a bank beside its queries: where no image has a class it has not."""
    return _num_loaders(trainer) > 1


def is_query_loader(trainer: Trainer, loader: int) -> bool:
    """Return whether a loader of the evaluation is that of the queries: the last."""
    return loader == _num_loaders(trainer) - 1


def _num_loaders(trainer: Trainer) -> int:
    return len(_loaders(trainer))


def _loaders(trainer: Trainer) -> list[Any]:
    loaders: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return loaders if isinstance(loaders, list) else [loaders]


def _dealt(trainer: Trainer, loader: int) -> DealtBatches | None:
    sampler = getattr(_loaders(trainer)[loader], "batch_sampler", None)
    return sampler if isinstance(sampler, DealtBatches) else None
