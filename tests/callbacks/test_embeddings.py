from types import SimpleNamespace

import pytest
import torch

from mlflow_ssl.callbacks import embeddings as module
from mlflow_ssl.callbacks.embeddings import Embeddings, Gathered, batch_rows, num_batches
from mlflow_ssl.datasets.bad_images import BAD_LABEL
from mlflow_ssl.datasets.sampler import DealtBatches


def test_batches_are_joined_in_their_order_and_loaders_kept_apart():
    kept = Embeddings()
    for loader, start in ((0, 0.0), (1, 10.0), (0, 1.0)):
        kept.add(loader, torch.full((2, 3), start), torch.full((2,), int(start)))
    (bank, labels, _), (queries, truth, _) = kept.take()
    assert bank[:, 0].tolist() == [0, 0, 1, 1]
    assert labels.tolist() == [0, 0, 1, 1]
    assert queries.tolist() == [[10.0] * 3] * 2
    assert truth.tolist() == [10, 10]


def test_half_precision_is_kept_as_float32():
    kept = Embeddings()
    for loader in (0, 1):
        kept.add(loader, torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2))
    (bank, _, _), (queries, _, _) = kept.take()
    assert bank.dtype == queries.dtype == torch.float32


def test_what_was_taken_is_forgotten():
    kept = Embeddings()
    for value in (1.0, 2.0):
        for loader in (0, 1):
            kept.add(loader, torch.full((1, 1), value), torch.zeros(1))
        (bank, _, _), (queries, _, _) = kept.take()
        assert bank.item() == queries.item() == pytest.approx(value)


def test_two_gatherings_share_nothing():
    first, second = Embeddings(), Embeddings()
    first.add(0, torch.ones(1, 1), torch.zeros(1))
    assert second.parts == {}


def in_evaluation(*, batches, rank=0, world_size=1, limit=None):
    """Return what an evaluation of a bank of 9 images and ``batches`` of 4 queries looks like to its callbacks."""
    dealt = [DealtBatches(9, 4, rank, world_size), DealtBatches(4 * batches, 4, rank, world_size)]
    return SimpleNamespace(
        testing=False,
        world_size=world_size,
        val_dataloaders=[SimpleNamespace(batch_sampler=sampler) for sampler in dealt],
        num_val_batches=[min(len(sampler), limit or 99) for sampler in dealt],
    )


def test_rows_are_those_of_the_data_set_and_a_borrowed_batch_has_none():
    first, second = (in_evaluation(batches=1, rank=rank, world_size=2) for rank in range(2))
    assert batch_rows(first, 0, 1).tolist() == [8]
    assert batch_rows(second, 0, 0).tolist() == [4, 5, 6, 7]
    assert batch_rows(first, 1, 0).tolist() == [0, 1, 2, 3]
    assert batch_rows(second, 1, 0).tolist() == [-1] * 4
    second.val_dataloaders = [[], []]  # not of our datamodules
    assert batch_rows(second, 1, 0) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_count_the_same_batches(rank):
    assert num_batches(in_evaluation(batches=5, rank=rank, world_size=2), 1) == 5
    assert num_batches(in_evaluation(batches=5, rank=rank, world_size=2, limit=1), 1) == 2


def test_neither_unreadable_images_nor_borrowed_batches_count():
    kept = Embeddings()
    kept.add(0, torch.arange(3.0)[:, None], torch.tensor([0, BAD_LABEL, 1]), torch.tensor([4, 5, 6]))
    kept.add(0, torch.arange(3.0)[:, None], torch.tensor([0, 0, 1]), torch.tensor([-1, -1, -1]))
    kept.add(0, torch.arange(3.0)[:, None], torch.tensor([2, 2, 2]), torch.tensor([0, 1, 2]), most=2)
    embeddings, labels, rows = kept.take_one(0)
    assert embeddings.flatten().tolist() == [0, 2, 0, 1]
    assert labels.tolist() == [0, 1, 2, 2]
    assert rows.tolist() == [4, 6, 0, 1]


def test_images_of_all_processes_are_in_the_order_of_the_data_set(monkeypatch):
    mine = Gathered(torch.tensor([[0.0], [4.0]]), torch.tensor([10, 14]), torch.tensor([0, 4]))
    theirs = Gathered(torch.tensor([[2.0]]), torch.tensor([12]), torch.tensor([2]))
    monkeypatch.setattr(module, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(
        module,
        "joined",
        lambda part, device, everywhere: torch.cat(
            [part, next(other for part_, other in zip(mine, theirs, strict=True) if part_ is part)]
        ),
    )
    whole = mine.of_all_processes(torch.device("cpu"))
    assert whole.embeddings.flatten().tolist() == whole.rows.tolist() == [0, 2, 4]
    assert whole.labels.tolist() == [10, 12, 14]
