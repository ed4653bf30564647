import base64
import json
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest
from packages import package, tiny_network

from mlflow_ssl.cli import main
from mlflow_ssl.datasets import vectors
from mlflow_ssl.datasets.vector_index import INDEX
from mlflow_ssl.datasets.vectors import VectorStore
from mlflow_ssl.errors import InputError
from mlflow_ssl.tasks.embed import embed
from mlflow_ssl.tasks.search import search
from mlflow_ssl.tracking.embedder import Embedder, open_embedder

pytestmark = pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy warn about themselves


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the folder of a small network as it is registered."""
    return package(tmp_path_factory.mktemp("packaged") / "package", tiny_network()) / "model"


@pytest.fixture
def images(image_folder):
    return image_folder({"cat": 12, "dog": 9, "élan": 5})


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(vectors, "PART_ROWS", 8)


def words(model, images, *more):
    return [f"model_uri={model}", f"data_path={images}", "device=cpu", *more]


def table(folder):
    return pandas.read_parquet(folder).set_index("path").sort_index()


def test_embeddings_are_those_that_the_model_serves(model, images, tmp_path, small_parts):
    store = embed(words(model, images, f"output={tmp_path / 'out'}"))
    got = table(store.folder)
    assert got["class_name"].to_dict() == {path: path.split("/")[0] for path in got.index}
    assert got["label"].nunique() == 3
    files = [base64.b64encode((images / path).read_bytes()).decode() for path in got.index]
    served = mlflow.pyfunc.load_model(str(model)).predict(files)
    assert len(served) == 26
    np.testing.assert_allclose(np.stack(got["embedding"]), np.array(served), atol=1e-5)


def test_without_classes_there_are_no_labels(model, images, tmp_path):
    got = table(embed(words(model, images, "labels=none", f"output={tmp_path / 'out'}")).folder)
    assert set(got["label"]) == {-1}


def test_a_stopped_embedding_goes_on_where_it_was(model, images, tmp_path, small_parts, monkeypatch):
    output = f"output={tmp_path / 'out'}"
    whole = table(embed(words(model, images, f"output={tmp_path / 'whole'}")).folder)
    embed_batch, done = Embedder.embed, []

    def counted(self, pictures):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(pictures))
        return embed_batch(self, pictures)

    monkeypatch.setattr(Embedder, "embed", counted)
    with pytest.raises(KeyboardInterrupt):
        embed(words(model, images, output))
    assert VectorStore.open(tmp_path / "out").missing == [2, 3]
    with pytest.raises(InputError, match=r"is not complete, 2 of 4 parts are missing; run embed again"):
        list(VectorStore.open(tmp_path / "out").read())
    done.clear()
    done.append(0)
    monkeypatch.setattr(
        Embedder, "embed", lambda self, pictures: done.append(len(pictures)) or embed_batch(self, pictures)
    )
    embed(words(model, images, output))
    assert done == [0, 8, 2]
    pandas.testing.assert_frame_equal(table(tmp_path / "out"), whole)


def test_a_folder_of_other_embeddings_is_left_alone(model, images, tmp_path):
    output = tmp_path / "out"
    embed(words(model, images, f"output={output}"))
    before = {file: file.read_bytes() for file in output.iterdir()}
    (images / "dog" / "000.png").unlink()
    with pytest.raises(InputError, match=r"^output holds embeddings of .*give another output=FOLDER$"):
        embed(words(model, images, f"output={output}"))
    assert {file: file.read_bytes() for file in output.iterdir()} == before


def test_a_folder_of_something_else_is_left_alone(model, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"out holds no embeddings; `embed` writes such a folder$"):
        embed(words(model, images, f"output={tmp_path / 'out'}"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_images_that_cannot_be_read_are_left_out_and_listed(model, images, tmp_path, capsys):
    (images / "cat" / "000.png").write_bytes(b"no image")
    store = embed(words(model, images, f"output={tmp_path / 'out'}"))
    assert "cat/000.png" not in table(store.folder).index
    assert (store.folder / vectors.BAD_IMAGES).read_text().splitlines()[1].startswith("cat/000.png,")
    assert "embedded   25 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data_path=x"], "model_uri must be given; add model_uri=..."),
        (["model_uri=models:/nothing/1", "data_path=x"], "model_uri: there is no model at models:/nothing/1: "),
        (["model_uri=models:/nothing@champion", "data_path=x"], "model_uri: there is no model at models:/nothing@"),
        (["model_uri=nowhere", "data_path=x"], "model_uri must be a registered model or a folder, got nowhere"),
        (["model_uri={model}"], "data_path must be given; add data_path=FOLDER"),
        (["model_uri={model}", "data_path=x"], "data_path"),
        (
            ["model_uri={images}", "data_path={images}"],
            "model_uri must be an MLflow model, got {images}, which has no MLmodel",
        ),
        (["model_uri={model}", "data_path={images}", "device=abacus"], "device must be auto or one that is here"),
        (["model_uri={model}", "data_path={images}", "colour=red"], "colour"),
        (
            ["model_uri={model}", "data_path={images}", "upload=maybe"],
            "upload must be true or false or auto, got maybe",
        ),
        (
            ["model_uri={model}", "data_path={images}", "upload=true"],
            "upload=true needs a run that gets the embeddings",
        ),
        (["model_uri={model}", "data_path={images}", "index=1"], "index must be true or false, got 1"),
        (["model_uri={model}", "data_path={images}", "input_size=big"], "input_size must be pixels, such as 224 or"),
    ],
)
def test_mistakes_get_one_line(store, model, images, capsys, given, message):
    assert main(["embed", *(word.format(model=model, images=images) for word in given)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message.format(images=images) in line


def test_a_launched_run_holds_the_embeddings(store, model, images, monkeypatch):
    run_id = store.create_run(store.create_experiment("here")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    assert main(["embed", "--model_uri", str(model), "--data_path", str(images)]) == 0
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["embed/images"] == 26
    folder = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="embeddings")
    assert len(pandas.read_parquet(folder)) == 26
    assert json.loads(Path(folder, vectors.MANIFEST).read_text())["num_images"] == 26


def test_an_index_is_written_beside_the_embeddings_and_asked(model, images, tmp_path, capsys, small_parts):
    plain = embed(words(model, images, f"output={tmp_path / 'out'}"))
    query = [f"embeddings={plain.folder}", f"image={images / 'dog' / '004.png'}", "neighbours=4"]
    (exact,) = search(query)
    embed(words(model, images, f"output={tmp_path / 'out'}", "index=true"))  # of what is there already
    assert f"index      {plain.folder / INDEX}\n" in capsys.readouterr().out
    (found,) = search(query)
    assert [row["path"] for row in found] == [row["path"] for row in exact]
    (plain.folder / INDEX).write_bytes(b"something else")
    with pytest.raises(InputError, match=r"is stale: .*; run embed again with index=true, or remove it$"):
        search(query)


@pytest.mark.parametrize("word", ["upload=false", "upload=auto"])
def test_a_run_is_told_where_embeddings_are_that_it_does_not_get(store, model, images, monkeypatch, tmp_path, word):
    monkeypatch.setattr("mlflow_ssl.tasks.embed.UPLOADED", 100)
    run_id = store.create_run(store.create_experiment("here")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    assert main(["embed", *words(model, images, f"output={tmp_path / 'out'}", word)]) == 0
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["embeddings.path"] == str(tmp_path / "out")
    names = {file.path for file in store.list_artifacts(run_id, "embeddings")}
    assert names == {f"embeddings/{vectors.MANIFEST}", f"embeddings/{vectors.BAD_IMAGES}"}


def test_a_run_gets_large_embeddings_when_it_shall(store, model, images, monkeypatch, tmp_path):
    monkeypatch.setattr("mlflow_ssl.tasks.embed.UPLOADED", 100)
    run_id = store.create_run(store.create_experiment("here")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    embed(words(model, images, f"output={tmp_path / 'out'}", "upload=true"))
    assert len(pandas.read_parquet(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/embeddings"))) == 26


def test_an_alias_is_resolved_once(store, model):
    mlflow.register_model(str(model), "tiny")
    store.set_registered_model_alias("tiny", "champion", "1")
    assert open_embedder("models:/tiny@champion", device="cpu").uri == "models:/tiny/1"
