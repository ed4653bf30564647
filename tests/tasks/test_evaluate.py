import csv

import foreign
import mlflow
import numpy as np
import pytest
import torch
from packages import package, resnet, tiny_network
from sklearn.neighbors import KNeighborsClassifier

from mlflow_ssl.cli import main
from mlflow_ssl.datasets.vectors import vectors
from mlflow_ssl.tasks.embed import embed
from mlflow_ssl.tasks.evaluate import PIXELS, UNTRAINED, evaluate, pixel_vectors
from mlflow_ssl.tracking.embedder import open_embedder
from mlflow_ssl.tracking.registry import register_package

pytestmark = pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy warn about themselves


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    return package(tmp_path_factory.mktemp("packaged") / "package", resnet())


@pytest.fixture
def model(packaged):
    return packaged / "model"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Return a model that this project did not register."""
    return foreign.save_pyfunc(tmp_path_factory.mktemp("service") / "model")


@pytest.fixture
def images(image_folder):
    return image_folder({"dark": 30, "grey": 30, "bright": 30}, size=16)


def words(model, images, *more):
    return [f"model_uri={model}", f"data_path={images}", "device=cpu", "val_size=0.2", "test_size=0.3", *more]


def test_the_figures_are_those_of_sklearn_on_what_embed_writes(store, model, images, tmp_path):
    result = evaluate(words(model, images, "few_labels=false"))
    (part,) = embed(words(model, images, f"output={tmp_path / 'out'}")).read()
    split, labels = part["split"].to_numpy(), part["label"].to_numpy()
    unit = vectors(part) / np.linalg.norm(vectors(part), axis=1, keepdims=True)
    bank, queries = split == "train", split == "test"
    assert result.truth.tolist() == labels[queries].tolist()
    for count in (1, 5):
        classifier = KNeighborsClassifier(count, metric="cosine").fit(unit[bank], labels[bank])
        expected = classifier.score(unit[queries], labels[queries])
        assert result.first.figures[f"knn_{count}"].value == pytest.approx(expected, abs=0.05)
    assert set(result.scores) == {str(model), UNTRAINED, PIXELS}
    assert set(result.differences) == {UNTRAINED, PIXELS}


def test_pixels_know_the_brightness_that_makes_the_classes(store, model, images):
    result = evaluate(words(model, images, "few_labels=false"))
    assert result.scores[PIXELS].figures["linear"].value > 0.9


def test_the_untrained_network_has_the_shape_and_nothing_else_of_the_trained(model):
    network = open_embedder(str(model), device="cpu")
    untrained, again, other = network.untrained(), network.untrained(), network.untrained(seed=1)
    image = torch.rand(2, 3, 32, 32)
    assert untrained.embed(image).shape == network.embed(image).shape
    assert not untrained.embed(image).allclose(network.embed(image))
    assert untrained.embed(image).equal(again.embed(image))
    assert not untrained.embed(image).allclose(other.embed(image))
    assert untrained.network.mean.equal(network.network.mean)


def test_a_run_is_linked_to_the_versions_and_holds_all(store, packaged, images, tmp_path, capsys):
    source = store.create_run(store.create_experiment("training")).info.run_id
    register_package(store, source, packaged)
    report = tmp_path / "report"
    assert main(["evaluate", *words("models:/tiny@champion", images), f"report={report}"]) == 0
    run_id = capsys.readouterr().out.split()[-1]
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["model_uri"] == "models:/tiny/1"
    (trained,) = store.get_run(source).outputs.model_outputs
    assert [model.model_id for model in run.inputs.model_inputs] == [trained.model_id]
    metrics = run.data.metrics
    assert metrics["knn_1_low"] <= metrics["knn_1"] <= metrics["knn_1_high"]
    assert metrics.keys() >= {"linear", "retrieval_map", "recall_at_1", "few_1_per_class", "rankme", "untrained/linear"}
    names = {file.path.partition("/")[2] for file in store.list_artifacts(run_id, "evaluation")}
    assert names >= {"report.txt", "scores.csv", "classes.csv", "confusion_matrix.png", "worst_confused.html"}
    assert {file.name for file in report.iterdir()} == names
    with (report / "classes.csv").open() as file:
        assert [row["class_name"] for row in csv.DictReader(file)] == ["bright", "dark", "grey"]


def test_another_network_stands_beside_the_first(store, model, images, tmp_path):
    other = package(tmp_path / "other", tiny_network()) / "model"
    result = evaluate(words(model, images, f"against={other}", "baselines=false", "few_labels=false"))
    assert list(result.scores) == [str(model), str(other)]
    first, second = (scores.figures["knn_5"].value for scores in result.scores.values())
    assert result.differences[str(other)]["knn_5"].value == pytest.approx(first - second)


def test_a_network_of_others_stands_beside_ours(store, model, images, tmp_path, capsys):
    folder = foreign.save_exported(tmp_path / "exported", foreign.network())
    more = ["trust_model=true", "mean=[0.5,0.5,0.5]", "std=[0.2,0.2,0.2]", "baselines=false", "few_labels=false"]
    result = evaluate(words(model, images, f"against={folder}", *more))
    assert list(result.scores) == [str(model), str(folder)]
    assert "exported sees images of 32x32, mean [0.5, 0.5, 0.5], std [0.2, 0.2, 0.2]" in capsys.readouterr().out


def test_a_service_of_others_is_measured_without_an_untrained_network(store, images, tmp_path, capsys):
    folder = foreign.save_pyfunc(tmp_path / "service", inputs=foreign.TEXT)
    run = ["trust_model=true", "input_size=16", "few_labels=false", f"report={tmp_path / 'report'}"]
    result = evaluate(words(folder, images, *run))
    assert set(result.scores) == {str(folder), PIXELS}
    assert result.first.figures["linear"].value > 0.7  # brightness makes the classes
    assert "no untrained network beside it: the weights of " in capsys.readouterr().out
    with (tmp_path / "report" / "differences.csv").open() as file:
        assert {row["against"] for row in csv.DictReader(file)} == {PIXELS}


def test_pixels_of_large_images_are_averaged():
    picture = torch.rand(2, 3, 64, 96)
    expected = picture.view(2, 3, 32, 2, 32, 3).mean((3, 5)).flatten(1)
    torch.testing.assert_close(pixel_vectors(picture), expected)
    small = torch.rand(2, 3, 8, 8)
    assert pixel_vectors(small).equal(small.flatten(1))


def test_without_labels_the_rank_is_what_there_is(store, model, images):
    result = evaluate(words(model, images, "labels=none", "baselines=false"))
    assert set(result.first.figures) == {"rankme"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data_path=x"], "model_uri must be given; add model_uri=..."),
        (["model_uri={model}"], "data_path must be given; add data_path=FOLDER"),
        (
            ["model_uri={model}", "data_path={images}", "test_size=0", "val_size=0"],
            "there are no test and no validation",
        ),
        (["model_uri={model}", "data_path={images}", "against=[models:/no/1]"], "there is no model at models:/no/1"),
        (["model_uri={other}", "data_path={images}"], "runs its code (it may be unpickled); add trust_model=true"),
        (["model_uri={other}", "data_path={images}", "trust_model=yes please"], "trust_model must be true or false"),
        (["model_uri={other}", "data_path={images}", "trust_model=true"], "input_size must be given, as "),
    ],
)
def test_mistakes_get_one_line(store, model, images, service, capsys, given, message):
    assert main(["evaluate", *(word.format(model=model, images=images, other=service) for word in given)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not mlflow.search_experiments(filter_string="name = 'evaluation'")  # and no run is left open
