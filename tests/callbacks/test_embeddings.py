import pytest
import torch

from mlflow_ssl.callbacks.embeddings import Embeddings


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
