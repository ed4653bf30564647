import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mlflow_ssl.evaluation import linear_accuracy


def clusters(num_images, spread, seed, dim=5, num_classes=3):
    """Return embeddings around one unit vector per class, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    return torch.eye(dim)[labels] + spread * torch.randn(num_images, dim, generator=generator), labels


def test_clusters_apart_are_classified_right():
    assert linear_accuracy(*clusters(30, 0.01, seed=0), *clusters(30, 0.01, seed=1)) == 1.0


def test_it_is_a_logistic_regression_on_embeddings_standardized_by_the_bank():
    (bank, labels), (queries, truth) = clusters(60, 0.6, seed=0), clusters(60, 0.6, seed=1)
    mean, std = bank.numpy().mean(0), bank.numpy().std(0)
    peer = LogisticRegression(max_iter=2000).fit((bank.numpy() - mean) / std, labels)
    expected = np.mean(peer.predict((queries.numpy() - mean) / std) == truth.numpy())
    assert 0.4 < expected < 0.95
    assert linear_accuracy(bank, labels, queries, truth) == pytest.approx(expected)


def test_the_unit_of_an_embedding_is_irrelevant():
    (bank, labels), (queries, truth) = clusters(60, 0.6, seed=0), clusters(60, 0.6, seed=1)
    unit, zero = torch.tensor([1e-3, 1.0, 50.0, 1e3, 1.0]), torch.tensor([0.0, 10.0, -5.0, 0.0, 1.0])
    expected = linear_accuracy(bank, labels, queries, truth)
    assert linear_accuracy(bank * unit + zero, labels, queries * unit + zero, truth) == expected


def test_half_precision_embeddings_equal_their_float32_conversion():
    (bank, labels), (queries, truth) = clusters(60, 0.6, seed=0), clusters(60, 0.6, seed=1)
    bank, queries = bank.bfloat16(), queries.bfloat16()
    expected = linear_accuracy(bank.float(), labels, queries.float(), truth)
    assert linear_accuracy(bank, labels, queries, truth) == expected


def test_queries_with_other_classes_score_0():
    bank, labels = clusters(30, 0.01, seed=0)
    assert linear_accuracy(bank, labels, bank, (labels + 1) % 3) == 0.0
