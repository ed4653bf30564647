import foreign
import mlflow
import numpy as np
import pandas
import pytest
from packages import package, resnet

from mlflow_ssl.cli import main
from mlflow_ssl.datasets import vectors
from mlflow_ssl.errors import InputError
from mlflow_ssl.tasks.embed import embed
from mlflow_ssl.tasks.search import inside, search

pytestmark = pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy warn about themselves


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return package(tmp_path_factory.mktemp("packaged") / "package", resnet()) / "model"


@pytest.fixture
def images(image_folder):
    return image_folder({"cat": 12, "dog": 9})


@pytest.fixture
def embedded(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "PART_ROWS", 8)
    return embed([f"model_uri={model}", f"data_path={images}", f"output={tmp_path / 'out'}"]).folder


def unit(rows):
    rows = np.stack(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_nearest_are_those_of_all_parts_together(embedded, images):
    asked = [images / "dog" / "004.png", images / "cat" / "007.png"]
    found = search([f"embeddings={embedded}", f"image=[{asked[0]},{asked[1]}]", "neighbours=5"])
    table = pandas.read_parquet(embedded)
    points = unit(table["embedding"])
    for file, rows in zip(asked, found, strict=True):
        (place,) = np.flatnonzero(table["path"] == file.relative_to(images).as_posix())
        cosines = points @ points[place]
        nearest = np.argsort(-cosines, kind="stable")[:5]
        assert [row["path"] for row in rows] == table["path"].iloc[nearest].tolist()
        np.testing.assert_allclose([row["similarity"] for row in rows], cosines[nearest], atol=1e-5)
        assert rows[0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_no_more_are_found_than_there_are(embedded, images, capsys):
    (rows,) = search([f"embeddings={embedded}", f"image={images / 'dog' / '004.png'}", "neighbours=100"])
    assert len(rows) == 21
    assert capsys.readouterr().out.splitlines()[1].endswith("  dog/004.png  dog")


def test_the_page_shows_query_and_neighbours(embedded, images, tmp_path):
    search([f"embeddings={embedded}", f"image={images / 'dog' / '004.png'}", "neighbours=3", f"report={tmp_path}"])
    page = (tmp_path / "search.html").read_text()
    assert page.count("<img ") == 4
    assert page.count("dog/004.png") >= 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["image=x"], "embeddings must be given; add embeddings=..."),
        (["embeddings=nowhere", "image=x"], "nowhere holds no embeddings; `embed` writes such a folder"),
        (["embeddings={embedded}"], "image must be given; add image=..."),
        (["embeddings={embedded}", "image=none.png"], "image must be a file that can be read, got none.png: No such"),
        (["embeddings={embedded}", "image={embedded}/_manifest.json"], "is no image of a format that is read"),
        (["embeddings={embedded}", "image=x", "neighbours=0"], "neighbours must be a number from 1 on, got 0"),
        (["embeddings={embedded}", "image=x", "colour=red"], "search takes embeddings, image, "),
    ],
)
def test_mistakes_get_one_line(store, embedded, capsys, given, message):
    capsys.readouterr()
    assert main(["search", *(word.format(embedded=embedded) for word in given)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_another_network_is_refused(embedded, images, tmp_path):
    other = package(tmp_path / "package", resnet(), transform=None) / "model"
    with pytest.raises(InputError, match=r"^model_uri must be the network of the embeddings, "):
        search([f"embeddings={embedded}", f"image={images / 'dog' / '004.png'}", f"model_uri={other}"])


def test_a_network_of_others_is_asked_again_as_it_was(images, tmp_path):
    network = foreign.save_torch(tmp_path / "model", foreign.network())
    trust = [f"model_uri={network}", "trust_model=true", "input_size=32"]
    embedded = embed([*trust, f"data_path={images}", f"output={tmp_path / 'out'}"]).folder
    query = [f"embeddings={embedded}", f"image={images / 'dog' / '004.png'}"]
    with pytest.raises(InputError, match="add trust_model=true"):
        search(query)
    (rows,) = search([*query, "trust_model=true"])  # the size of the images is remembered
    assert rows[0]["path"] == "dog/004.png"
    assert rows[0]["similarity"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match=r"^model_uri must be the network of the embeddings, "):
        search(
            [*query, f"model_uri={foreign.save_torch(tmp_path / 'other', foreign.network(seed=1))}", "trust_model=true"]
        )


def test_a_launched_run_holds_the_page(store, embedded, images, monkeypatch):
    run_id = store.create_run(store.create_experiment("here")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    assert main(["search", "--embeddings", str(embedded), "--image", str(images / "dog" / "004.png")]) == 0
    assert store.get_run(run_id).info.status == "FINISHED"
    assert "<img " in mlflow.artifacts.load_text(f"runs:/{run_id}/search/search.html")


def test_no_file_outside_of_the_data_is_shown(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "a.png").write_bytes(b"x")
    assert inside(tmp_path / "data", "a.png") == tmp_path / "data" / "a.png"
    assert inside(tmp_path / "data", "../secret.png") is None
    assert inside(tmp_path / "data", "link.png") is None
    assert inside(tmp_path / "data", "none.png") is None
