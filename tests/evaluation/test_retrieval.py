import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch.nn.functional import normalize

from mlflow_ssl.evaluation.retrieval import retrieve


def points(count, seed=0, size=6):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 60), st.integers(1, 5))
def test_average_precision_is_sklearns(seed, num_queries, num_entries, chunk_size):
    queries, gallery = points(num_queries, seed), points(num_entries, seed + 1)
    labels, classes = torch.arange(num_queries) % 3, torch.arange(num_entries) % 4
    found = retrieve(queries, labels, gallery, classes, chunk_size=chunk_size)
    cosines = normalize(queries, dim=1) @ normalize(gallery, dim=1).T
    for row in range(num_queries):
        relevant = (classes == labels[row]).numpy()
        if relevant.any():
            expected = average_precision_score(relevant, cosines[row].numpy())
            assert found.average_precision[row].item() == pytest.approx(expected, abs=1e-5)
        else:
            assert found.average_precision[row].isnan()


def test_recall_is_whether_one_of_the_nearest_is_right():
    queries, gallery = points(40), points(90, seed=1)
    labels, classes = torch.arange(40) % 5, torch.arange(90) % 5
    found = retrieve(queries, labels, gallery, classes, ks=(1, 5, 10, 1000))
    order = np.argsort(-(normalize(queries, dim=1) @ normalize(gallery, dim=1).T).numpy(), axis=1)
    assert list(found.recall) == [1, 5, 10]
    for k, recall in found.recall.items():
        expected = [labels[row].item() in classes[order[row, :k]] for row in range(40)]
        assert recall.bool().tolist() == expected


def test_nothing_finds_nothing():
    with pytest.raises(ValueError, match=r"^there must be queries and a gallery, got 0 and 3$"):
        retrieve(points(0), torch.empty(0), points(3), torch.zeros(3))
