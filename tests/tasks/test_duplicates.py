import csv
import shutil

import mlflow
import pytest
from packages import package, resnet
from PIL import Image

from mlflow_ssl.cli import main
from mlflow_ssl.tasks.duplicates import duplicates
from mlflow_ssl.tasks.embed import embed

pytestmark = pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy warn about themselves


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return package(tmp_path_factory.mktemp("packaged") / "package", resnet()) / "model"


@pytest.fixture
def images(image_folder):
    """Return bright and dark images, one of them twice, and one among the others."""
    folder = image_folder({"dark": 20, "bright": 20}, size=32)
    with Image.open(folder / "dark" / "003.png") as image:
        image.save(folder / "dark" / "copy.jpg", quality=100, subsampling=0)  # the same to the eye, not to a digest
    shutil.move(folder / "bright" / "005.png", folder / "dark" / "misplaced.png")
    return folder


@pytest.fixture
def embedded(model, images, tmp_path):
    return embed([f"model_uri={model}", f"data_path={images}", f"output={tmp_path / 'out'}"]).folder


def closest(embedded):
    """Return a threshold that only the two most similar images reach."""
    copies, _ = duplicates([f"embeddings={embedded}", "threshold=-1"])
    best = sorted(copies["similarity"].to_pylist(), reverse=True)
    assert best[0] == best[1] > best[2]
    return (best[0] + best[2]) / 2


def test_copies_and_wrong_labels_are_found(embedded, tmp_path, capsys):
    threshold = closest(embedded)
    capsys.readouterr()
    copies, doubted = duplicates([f"embeddings={embedded}", f"threshold={threshold}", f"report={tmp_path / 'report'}"])
    assert copies["path"].to_pylist() == ["dark/003.png", "dark/copy.jpg"]
    assert copies["group"].to_pylist() == [0, 0]
    (wrong,) = doubted.to_pylist()
    assert (wrong["path"], wrong["class_name"], wrong["likely"]) == ("dark/misplaced.png", "dark", "bright")
    assert wrong["votes"] < 0.5 < wrong["likely_votes"]
    said = capsys.readouterr().out
    assert "copies     2 images in 1 groups" in said
    assert "labels     1 that the neighbours contradict" in said
    page = (tmp_path / "report" / "duplicates.html").read_text()
    assert page.count("<img ") == 2 + 1 + 5
    with (tmp_path / "report" / "doubted_labels.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["dark/misplaced.png"]


def test_without_a_report_the_page_lies_beside_the_embeddings(embedded):
    duplicates([f"embeddings={embedded}"])
    assert (embedded / "_duplicates.html").exists()
    assert duplicates([f"embeddings={embedded}"])  # and does not disturb who reads them


def test_names_on_the_page_are_text_and_nothing_else(model, image_folder, tmp_path):
    images = image_folder({"<script>alert(1)<": 6, "b": 6}, size=32)
    folder = embed([f"model_uri={model}", f"data_path={images}", f"output={tmp_path / 'out'}"]).folder
    duplicates([f"embeddings={folder}", "threshold=-1"])
    page = (folder / "_duplicates.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "embeddings must be given; add embeddings=..."),
        (["embeddings={embedded}", "threshold=2"], "threshold must be a number between -1 and 1, got 2"),
        (["embeddings={embedded}", "neighbours=no"], "neighbours must be a number between 1 and 10000, got no"),
        (["embeddings={embedded}", "data_path=x"], "duplicates takes embeddings, threshold, neighbours, report, got"),
        (["embeddings={embedded}", "report={embedded}/_manifest.json"], "report must be a folder that can be written"),
    ],
)
def test_mistakes_get_one_line(store, embedded, capsys, given, message):
    capsys.readouterr()
    assert main(["duplicates", *(word.format(embedded=embedded) for word in given)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_launched_run_holds_page_and_tables(store, embedded, monkeypatch):
    run_id = store.create_run(store.create_experiment("here")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    assert main(["duplicates", "--embeddings", str(embedded)]) == 0
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["data/doubted_labels"] == 1
    names = {file.path for file in store.list_artifacts(run_id, "duplicates")}
    assert names == {f"duplicates/{name}" for name in ("duplicates.html", "copies.csv", "doubted_labels.csv")}
    assert "dark/misplaced.png" in mlflow.artifacts.load_text(f"runs:/{run_id}/duplicates/doubted_labels.csv")
