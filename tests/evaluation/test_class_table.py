import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from mlflow_ssl.evaluation.confusion import class_table, confusion_matrix, most_confused


def drawn(seed, count=80, num_classes=6):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, num_classes, (2, count)))


@given(st.integers(0, 10**6))
def test_matrix_and_table_are_sklearns(seed):
    labels, predicted = drawn(seed)
    counts = confusion_matrix(labels, predicted, num_classes=8)
    np.testing.assert_array_equal(counts, metrics.confusion_matrix(labels, predicted, labels=range(8)))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(8), zero_division=0
    )
    table = class_table(counts)
    for ours, theirs in zip(table, (support, precision, recall, f1), strict=True):
        np.testing.assert_allclose(ours, theirs)


def test_the_most_frequent_mistakes_come_first():
    counts = torch.tensor([[5, 2, 0], [4, 9, 2], [0, 0, 7]])
    assert [tuple(pair) for pair in most_confused(counts)] == [(1, 0, 4), (0, 1, 2), (1, 2, 2)]
    assert len(most_confused(counts, 1)) == 1


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"^confusion must have the shape \(C, C\), got \(2, 3\)$"):
        class_table(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^labels and predicted must have one shape"):
        confusion_matrix(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^labels and predicted must be classes in 0..1, got 0 to 2$"):
        confusion_matrix(torch.tensor([0, 2]), torch.tensor([1, 1]), num_classes=2)
