import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from mlflow_ssl.evaluation.knn import Neighbours
from mlflow_ssl.evaluation.suspects import copy_groups, doubts, neighbours_within


def embeddings(count=60, size=8, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_neighbours_are_those_of_sklearn_without_the_image_itself():
    points = embeddings()
    distances, indices = NearestNeighbors(n_neighbors=6, metric="cosine").fit(points).kneighbors(points)
    found = neighbours_within(points, 5)
    np.testing.assert_array_equal(found.indices, indices[:, 1:])
    np.testing.assert_allclose(found.similarities, 1 - distances[:, 1:], atol=1e-6)


def test_an_image_is_never_its_own_neighbour_however_many_copies_it_has():
    points = torch.cat([embeddings(1).expand(9, -1), embeddings(5, seed=1)])
    found = neighbours_within(points, 3)
    assert found.indices.shape == (14, 3)
    assert (found.indices != torch.arange(14).unsqueeze(1)).all()
    torch.testing.assert_close(found.similarities[:9], torch.ones(9, 3))


def test_there_are_no_more_neighbours_than_others():
    assert neighbours_within(embeddings(3), 10).indices.shape == (3, 2)
    with pytest.raises(ValueError, match=r"^embeddings must be at least two, got 1$"):
        neighbours_within(embeddings(1), 1)


@given(st.integers(0, 10**6), st.floats(0.5, 0.999))
def test_groups_are_the_chains_of_similar_images(seed, threshold):
    points = torch.cat([embeddings(12, 3, seed), embeddings(12, 3, seed + 1)])
    found = neighbours_within(points, 23)
    groups = copy_groups(found, threshold=threshold)
    unit = torch.nn.functional.normalize(points, dim=1)
    joined = {number: {number} for number in range(24)}
    for one, other in itertools.combinations(range(24), 2):
        if abs(unit[one] @ unit[other] - threshold) < 1e-5:
            return  # rounding decides
        if unit[one] @ unit[other] >= threshold:
            together = joined[one] | joined[other]
            joined |= dict.fromkeys(together, together)
    for number in range(24):
        expected = joined[number] if len(joined[number]) > 1 else set()
        got = set(np.flatnonzero(groups == groups[number]).tolist()) if groups[number] >= 0 else set()
        assert got == expected
    assert set(groups[groups >= 0]) == set(range(groups.max() + 1))


def test_a_wrong_label_is_doubted_and_no_other():
    centres = 5 * torch.eye(3, 8)
    truth = torch.arange(90) % 3
    points = centres[truth] + 0.3 * embeddings(90)
    labels = truth.clone()
    labels[7], labels[50] = 0, 1  # are 1 and 2
    found = doubts(neighbours_within(points, 10), labels)
    assert set((found.own < 0.5).nonzero().flatten().tolist()) == {7, 50}
    assert found.other[[7, 50]].tolist() == [1, 2]
    assert (found.share[[7, 50]] > 0.8).all()


def test_images_without_a_class_have_no_vote_and_no_doubt():
    found = Neighbours(torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.8, 0.1]]), torch.tensor([[1, 2], [0, 2], [0, 1]]))
    answer = doubts(found, torch.tensor([-1, 0, 1]), temperature=0.5)
    assert answer.own[0] == 1
    assert answer.own[1] == 0  # only image 2, of class 1, has a vote
    assert answer.other[1] == 1
