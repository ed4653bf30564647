import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch

from mlflow_ssl.datasets import vector_index, vectors
from mlflow_ssl.datasets.vector_index import INDEX, ask, build_index, open_index
from mlflow_ssl.datasets.vectors import MANIFEST, Manifest, VectorStore
from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation.knn import nearest
from mlflow_ssl.tasks.search import nearest_images


def images(rows, first=0):
    names = [f"{number:03d}.png" for number in range(first, first + rows)]
    columns = {"path": names, "class_name": ["a"] * rows, "label": [0] * rows, "split": ["train"] * rows}
    return pa.table({**columns, "part": [0] * rows})


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)


@pytest.fixture
def store(tmp_path, points, monkeypatch):
    """Return 20 embeddings in parts of 8; the last part has one image less than it might."""
    monkeypatch.setattr(vectors, "PART_ROWS", 8)
    store = VectorStore.create(tmp_path / "store", Manifest("m", "m1", "d", "d1", 6, 21))
    for part, rows in enumerate((range(8), range(8, 16), range(16, 20))):
        store.write(part, images(len(rows), rows.start), points[rows])
    return store


def test_its_answers_are_those_of_the_exact_search(store, points):
    queries = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32))
    by_parts = nearest_images(store, queries, 7)
    assert build_index(store)
    similarities, rows = ask(open_index(store), queries.numpy(), 7)
    exact = nearest(queries, torch.from_numpy(points), 7)
    assert rows.tolist() == exact.indices.tolist()
    np.testing.assert_allclose(similarities, exact.similarities, atol=1e-6)
    for found, expected in zip(nearest_images(store, queries, 7), by_parts, strict=True):
        assert [row["path"] for row in found] == [row["path"] for row in expected]
        assert [row["similarity"] for row in found] == pytest.approx([row["similarity"] for row in expected], abs=1e-6)


def test_the_index_is_what_is_asked(store, points, monkeypatch):
    build_index(store)
    monkeypatch.setattr(vector_index, "ask", None)
    monkeypatch.setattr("mlflow_ssl.tasks.search.nearest", None)
    assert nearest_images(store, torch.from_numpy(points[3:4]), 1)[0][0]["path"] == "003.png"


def test_copies_come_in_the_order_of_their_rows(store, points):
    store.write(1, images(8, 8), np.stack([points[2]] * 8))
    build_index(store)
    _, rows = ask(open_index(store), points[2:3], 9)
    assert rows.tolist() == [[2, *range(8, 16)]]


def test_no_more_are_found_than_there_are(store, points):
    build_index(store)
    assert sorted(ask(open_index(store), points[:1], 100)[1][0].tolist()) == list(range(20))


def test_readers_of_parquet_pass_it_over(store):
    build_index(store)
    assert len(pandas.read_parquet(store.folder)) == 20


def test_what_is_there_is_not_built_again(store):
    assert build_index(store)
    assert not build_index(store)
    again = VectorStore.create(store.folder, Manifest("m", "m1", "d", "d1", 6, 21))
    assert again.manifest.index == store.manifest.index
    (store.folder / INDEX).unlink()
    assert open_index(again) is None
    assert build_index(again)


def test_an_index_of_other_embeddings_is_refused_and_built_again(store, points):
    build_index(store)
    store.write(2, images(5, 16), points[:5])
    with pytest.raises(InputError, match=r"is stale: the embeddings are others .*with index=true, or remove it$"):
        open_index(store)
    assert build_index(store)
    assert open_index(store).ntotal == 21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file[:-1], "it has .* bytes, not those of 20 embeddings of 6 numbers"),
        (lambda file: file[:8] + b"\xff" * 8 + file[16:], "of another kind, or of another number of embeddings"),
        (lambda file: b"IxF2" + file[4:], "of another kind"),
    ],
)
def test_a_file_that_is_not_what_the_manifest_says_is_not_read(store, change, message, monkeypatch):
    build_index(store)
    file = store.folder / INDEX
    file.write_bytes(change(file.read_bytes()))
    monkeypatch.setattr("faiss.read_index", None)
    with pytest.raises(InputError, match=message):
        open_index(store)


def test_a_manifest_without_the_index_makes_it_a_stranger(store):
    build_index(store)
    text = (store.folder / MANIFEST).read_text()
    (store.folder / MANIFEST).write_text(text[: text.index(',\n  "index"')] + "}")
    with pytest.raises(InputError, match="is stale: the manifest does not name it"):
        open_index(VectorStore.open(store.folder))
