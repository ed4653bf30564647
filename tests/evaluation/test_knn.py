import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from mlflow_ssl.evaluation import knn, knn_predict
from mlflow_ssl.evaluation.knn import Neighbours, accuracy, knn_sweep, merge, nearest, vote


@pytest.fixture(scope="module", autouse=True, params=["faiss", "torch"])
def search(request):
    """Have every search done by either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "SMALL", 0 if request.param == "faiss" else 2**62)
        yield


def random_data(num_bank=60, num_queries=25, dim=8, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(num_bank, dim, generator=generator)
    labels = torch.randint(num_classes, (num_bank,), generator=generator)
    return torch.randn(num_queries, dim, generator=generator), bank, labels


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def votes_by_hand(queries, bank, labels, k, temperature):
    """Return the weighted winner of each query, in plain Python."""
    winners = []
    for query in queries.tolist():
        nearest = sorted(((cosine(query, entry), c) for entry, c in zip(bank.tolist(), labels.tolist(), strict=True)))
        votes = {}
        for similarity, c in nearest[-k:]:
            votes[c] = votes.get(c, 0) + math.exp(similarity / temperature)
        winners.append(min(votes, key=lambda c: (-votes[c], c)))
    return winners


@pytest.mark.parametrize("k", [1, 5, 20, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_majority_is_scikit_learns(k, seed):
    queries, bank, labels = random_data(seed=seed)
    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(bank.numpy(), labels.numpy())
    assert knn_predict(queries, bank, labels, num_neighbours=k).majority.tolist() == peer.predict(queries).tolist()


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_weighted_vote_is_the_formula(k, temperature):
    queries, bank, labels = random_data()
    got = knn_predict(queries, bank, labels, num_neighbours=k, temperature=temperature).weighted
    assert got.tolist() == votes_by_hand(queries, bank, labels, k, temperature)


def test_a_bank_entry_finds_itself():
    _, bank, labels = random_data()
    for predicted in knn_predict(bank, bank, labels, num_neighbours=1):
        assert predicted.equal(labels)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_the_bank_is_irrelevant(seed):
    queries, bank, labels = random_data()
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))
    expected = knn_predict(queries, bank, labels, num_neighbours=7)
    for a, b in zip(knn_predict(queries, bank[order], labels[order], num_neighbours=7), expected, strict=True):
        assert a.equal(b)


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3))
def test_the_length_of_an_embedding_is_irrelevant(scale):
    queries, bank, labels = random_data()
    stretched = bank.clone()
    stretched[::2] *= scale
    expected = knn_predict(queries, bank, labels, num_neighbours=7)
    for a, b in zip(knn_predict(scale * queries, stretched, labels, num_neighbours=7), expected, strict=True):
        assert a.equal(b)


def at_angles(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


@pytest.mark.parametrize(("temperature", "winner"), [(0.01, 0), (10.0, 1)])
def test_the_temperature_flips_a_vote(temperature, winner):
    # one neighbour of class 0 at 5 degrees, two of class 1 at 40
    bank, labels = at_angles(5, 40, -40), torch.tensor([0, 1, 1])
    votes = knn_predict(at_angles(0), bank, labels, num_neighbours=3, temperature=temperature)
    assert votes.weighted.item() == winner
    assert votes.majority.item() == 1


def test_a_tiny_temperature_does_not_overflow():
    # infinite weights would make a draw of it, which class 0 wins
    bank, labels = at_angles(5, 40, -40), torch.tensor([1, 0, 0])
    votes = knn_predict(at_angles(0), bank, labels, num_neighbours=3, temperature=1e-6)
    assert votes.weighted.item() == 1


@pytest.mark.parametrize("labels", [[2, 1], [1, 2]])
def test_a_draw_goes_to_the_smaller_class(labels):
    bank = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for predicted in knn_predict(torch.tensor([[1.0, 0.0]]), bank, torch.tensor(labels), num_neighbours=2):
        assert predicted.item() == 1


def test_half_precision_queries_equal_their_float32_conversion():
    queries, bank, labels = random_data()
    half = queries.bfloat16()
    expected = knn_predict(half.float(), bank, labels, num_neighbours=5)
    for a, b in zip(knn_predict(half, bank, labels, num_neighbours=5), expected, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("chunk_size", [1, 7, 25, 1000])
def test_the_chunk_size_is_irrelevant(chunk_size):
    queries, bank, labels = random_data()
    expected = knn_predict(queries, bank, labels, num_neighbours=5)
    for a, b in zip(knn_predict(queries, bank, labels, num_neighbours=5, chunk_size=chunk_size), expected, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_the_nearest_are_those_of_the_largest_cosines(chunk_size):
    queries, bank, _ = random_data()
    found = nearest(queries, bank, 5, chunk_size=chunk_size)
    for query, similarities, indices in zip(queries.tolist(), *found, strict=True):
        cosines = [cosine(query, entry) for entry in bank.tolist()]
        expected = sorted(range(len(bank)), key=lambda place: -cosines[place])[:5]
        assert indices.tolist() == expected
        assert similarities.tolist() == pytest.approx([cosines[place] for place in expected], abs=1e-6)


@pytest.mark.parametrize("k", [0, 61])
def test_more_neighbours_than_the_bank_has_are_refused(k):
    queries, bank, labels = random_data()
    message = f"num_neighbours must be between 1 and the bank size 60, got {k}"
    with pytest.raises(ValueError, match=message):
        knn_predict(queries, bank, labels, num_neighbours=k)
    with pytest.raises(ValueError, match=message):
        nearest(queries, bank, k)


def test_accuracy_is_the_share_that_is_equal():
    assert accuracy(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])) == pytest.approx(2 / 3)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 13))
def test_the_nearest_do_not_depend_on_the_chunks(seed, chunk_size, bank_chunk_size):
    generator = torch.Generator().manual_seed(seed)
    queries, bank = (torch.randint(-2, 3, (count, 3), generator=generator).float() for count in (11, 17))
    whole = nearest(queries, bank, 5, chunk_size=100, bank_chunk_size=100)
    chunked = nearest(queries, bank, 5, chunk_size=chunk_size, bank_chunk_size=bank_chunk_size)
    torch.testing.assert_close(chunked.similarities, whole.similarities)
    assert (chunked.indices.sort(1).values[:, 1:] > chunked.indices.sort(1).values[:, :-1]).all()  # each once


def test_of_equally_near_entries_the_first_come_first():
    bank = torch.eye(4).repeat(6, 1)
    found = nearest(torch.eye(4), bank, 3, bank_chunk_size=5)
    assert found.indices.tolist() == [[row, row + 4, row + 8] for row in range(4)]


def brute_force(queries, bank, k):
    """Return the places of the nearest and their cosines, in float64; of equals the first come first."""
    queries, bank = (each.double() / each.double().norm(dim=1, keepdim=True) for each in (queries, bank))
    cosines, places = (queries @ bank.T).sort(dim=1, descending=True, stable=True)
    return cosines[:, :k], places[:, :k]


@pytest.mark.parametrize("order", ["as drawn", "farthest first", "nearest first"])
@pytest.mark.parametrize("bank_chunk_size", [500, 1037, 8000])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_a_large_bank_is_searched_exactly_with_all_its_draws(k, bank_chunk_size, order):
    generator = torch.Generator().manual_seed(k)
    # 16 numbers of 1 and -1: few cosines, none of which is rounded
    queries, bank = (torch.randint(2, (count, 16), generator=generator) * 2.0 - 1 for count in (33, 3000))
    if order != "as drawn":
        bank = bank[(bank @ queries[0]).argsort(descending=order == "nearest first")]
    found = nearest(queries, bank, k, chunk_size=20, bank_chunk_size=bank_chunk_size)
    cosines, places = brute_force(queries, bank, k)
    assert found.indices.equal(places)
    assert found.similarities.double().equal(cosines)


@pytest.mark.parametrize("bank_chunk_size", [700, 8000])
def test_a_large_bank_of_any_numbers_is_searched_exactly(bank_chunk_size):
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.randn(count, 24, generator=generator) for count in (50, 5000))
    found = nearest(queries, bank, 20, bank_chunk_size=bank_chunk_size)
    cosines, places = brute_force(queries, bank, 20)
    assert found.indices.equal(places)
    torch.testing.assert_close(found.similarities.double(), cosines, rtol=0, atol=1e-6)


def test_what_is_no_number_comes_first_and_hides_nothing():
    generator = torch.Generator().manual_seed(0)
    query, bank = (torch.randn(count, 8, generator=generator) for count in (1, 2000))
    bank = bank[brute_force(query, bank, 2000)[1][0]]  # in the later chunks nothing else is near
    bank[1500] = math.nan
    assert nearest(query, bank, 5, bank_chunk_size=600).indices.tolist() == [[1500, 0, 1, 2, 3]]
    nothing = nearest(query * math.nan, bank, 5, bank_chunk_size=600)
    assert len({place for place in nothing.indices[0].tolist() if 0 <= place < 2000}) == 5


def test_float32_is_multiplied_as_such_whatever_the_training_allows():
    queries, bank, _ = random_data(
        num_bank=1000, num_queries=1000, dim=512
    )  # small ones are never multiplied otherwise
    expected = nearest(queries, bank, 5)
    torch.set_float32_matmul_precision("medium")  # on a CPU that has it: bfloat16
    try:
        found = nearest(queries, bank, 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.similarities.equal(expected.similarities)


PEAK = """
import resource, torch
from mlflow_ssl.evaluation.knn import nearest
torch.set_num_threads(1)
bank = torch.empty(200_000, 128, dtype=torch.half)  # 51 MB; 102 as float32
for part in bank.split(1000):  # so that making it takes no more memory than it has
    part.copy_(torch.randn(part.shape))
nearest(bank[:64], bank[:64], 20)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
found = nearest(bank[:2000], bank, 20)  # 1,600 MB of similarities
assert (found.indices[:, 0] == torch.arange(2000)).all()
print(peak() - before)
"""


def test_the_memory_of_a_search_does_not_grow_with_the_bank():
    done = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 100  # MiB


@pytest.mark.parametrize(("count", "loaded"), [(100, "False"), (3000, "True")])
def test_faiss_is_loaded_for_large_banks_alone(count, loaded):
    code = f"import sys, torch; from mlflow_ssl.evaluation.knn import nearest; e = torch.randn({count}, 64); "
    words = [sys.executable, "-c", code + "nearest(e, e, 3); print('faiss' in sys.modules)"]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout.split() == [loaded]


def test_a_sweep_is_one_vote_after_the_other():
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.randn(count, 4, generator=generator) for count in (30, 60))
    labels = torch.arange(60) % 5
    swept = knn_sweep(queries, bank, labels, neighbours=(50, 1, 7, 200), temperature=0.2)
    assert list(swept) == [1, 7, 50]
    for count, votes in swept.items():
        alone = knn_predict(queries, bank, labels, num_neighbours=count, temperature=0.2)
        assert votes.majority.equal(alone.majority)
        assert votes.weighted.equal(alone.weighted)


@pytest.mark.parametrize("neighbours", [(), (61,), (0, 5)])
def test_a_sweep_over_nothing_is_refused(neighbours):
    with pytest.raises(ValueError, match=r"^neighbours must name a number between 1 and the bank size 60"):
        knn_sweep(torch.randn(2, 4), torch.randn(60, 4), torch.arange(60) % 5, neighbours=neighbours)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 9))
def test_what_parts_of_a_bank_have_merges_to_what_the_whole_has(seed, num_parts, k):
    generator = torch.Generator().manual_seed(seed)
    # 16 numbers of 1 and -1: many draws, none by rounding
    queries, bank = (torch.randint(2, (count, 16), generator=generator) * 2.0 - 1 for count in (7, 50))
    parts = []
    for number in range(num_parts):
        places = torch.arange(number, 50, num_parts)
        found = nearest(queries, bank[places], min(k, len(places)))
        parts.append(Neighbours(found.similarities, places[found.indices]))
    merged, whole = merge(parts, k), nearest(queries, bank, k)
    assert merged.indices.equal(whole.indices)
    assert merged.similarities.equal(whole.similarities)


def test_a_vote_of_the_found_is_the_prediction():
    queries, bank, labels = random_data()
    votes = vote(nearest(queries, bank, 7), labels, temperature=0.2)
    for a, b in zip(votes, knn_predict(queries, bank, labels, num_neighbours=7, temperature=0.2), strict=True):
        assert a.equal(b)
    with pytest.raises(ValueError, match=r"^temperature must be above 0, got 0"):
        vote(nearest(queries, bank, 7), labels, temperature=0)


def test_nothing_is_found_for_no_queries():
    _, bank, _ = random_data()
    found = nearest(torch.empty(0, 8), bank, 5)
    assert found.similarities.shape == found.indices.shape == (0, 5)
