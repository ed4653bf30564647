"""Plain MLflow code on a timm network that has nothing to do with this project."""

import subprocess
import sys

import mlflow
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from mlflow.exceptions import MlflowException
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

pytestmark = pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy warn about themselves


def timm_model():
    """Return a model: pixels of a digit, flat, to the embedding of an untrained resnet."""

    class Timm(mlflow.pyfunc.PythonModel):  # inside, as pytest collects before warnings are allowed
        def load_context(self, context):
            torch.manual_seed(0)
            self.network = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()

        @torch.inference_mode()
        def predict(self, context, model_input, params=None):
            pixels = torch.from_numpy(np.asarray(model_input, dtype=np.float32)).view(-1, 1, 8, 8)
            images = torch.nn.functional.interpolate(pixels / 16, size=32).expand(-1, 3, -1, -1)
            return self.network(images).numpy()

    return Timm()


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    frame = pd.DataFrame(pixels[:400], columns=[f"p{number}" for number in range(64)])
    return frame.assign(digit=[f"digit {label}" for label in labels[:400]])


def evaluate(model, data, **options):
    return mlflow.models.evaluate(model, data, model_type="embedding", evaluators="ssl", **options)


def by_sklearn(vectors, labels, count, seed=0):
    """Return the accuracy of neighbours on the very rows that are asked."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    bank, queries = train_test_split(rows, train_size=0.7, stratify=labels, random_state=seed)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    classifier = KNeighborsClassifier(count, metric="cosine").fit(unit[bank], labels[bank])
    return classifier.score(unit[queries], labels[queries])


def test_a_foreign_network_is_measured_as_sklearn_does_and_the_run_holds_it(store, digits):
    with mlflow.start_run() as run:
        logged = mlflow.pyfunc.log_model(name="foreign", python_model=timm_model(), pip_requirements=["timm"])
        result = evaluate(logged.model_uri, digits, targets="digit")
    model = timm_model()
    model.load_context(None)
    vectors = model.predict(None, digits.drop(columns="digit"))
    for count in (1, 5, 20):
        expected = by_sklearn(vectors, digits["digit"].to_numpy(), count)
        assert result.metrics[f"knn_{count}"] == pytest.approx(expected, abs=0.01)  # draws are broken otherwise
        assert result.metrics[f"knn_{count}_low"] < expected < result.metrics[f"knn_{count}_high"]
    assert 1 < result.metrics["rankme"] < 64
    assert store.get_run(run.info.run_id).data.metrics.items() >= result.metrics.items()
    classes = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/evaluation/classes.json")["classes"]
    assert [row["class_name"] for row in classes] == [f"digit {number}" for number in range(10)]
    assert sum(row["images"] for row in classes) == 120
    assert result.artifacts["classes"].content["classes"] == classes


def columns_of_lists(vectors):
    return pd.DataFrame({"embedding": list(vectors)})


@pytest.mark.parametrize("form", [np.asarray, pd.DataFrame, columns_of_lists, torch.from_numpy, np.ndarray.tolist])
def test_vectors_may_come_in_any_form(store, digits, form):
    vectors = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)

    def model(frame):
        return form(vectors[frame.index])

    metrics = evaluate(model, digits, targets="digit").metrics
    assert metrics["knn_20"] < 0.3  # noise
    assert metrics["rankme"] == pytest.approx(8, abs=0.5)


def test_embeddings_that_are_there_already_need_no_model(store, digits):
    vectors = np.eye(10)[digits["digit"].str[-1].astype(int)] + 0.01
    data = pd.DataFrame({"embedding": list(vectors), "digit": digits["digit"]})
    assert evaluate(None, data, targets="digit", predictions="embedding").metrics["knn_5"] == 1


def one_hot(digits, right=1.0, seed=0):
    """Return vectors that tell the class, of a share of the rows."""
    rng = np.random.default_rng(seed)
    known = digits["digit"].str[-1].astype(int).to_numpy()
    said = np.where(rng.random(len(known)) < right, known, rng.integers(0, 10, len(known)))
    return np.eye(10)[said] + rng.normal(size=(len(known), 10)) * 0.1


def test_few_labels_are_measured_when_asked_for(store, digits):
    def pixels(frame):
        return frame.to_numpy()

    plain = evaluate(pixels, digits, targets="digit").metrics
    config = {"few_labels": True}
    few = evaluate(pixels, digits, targets="digit", evaluator_config=config).metrics
    new = {f"few_{name}" for name in ("1_per_class", "5_per_class", "1_percent", "10_percent")}
    assert few.keys() - plain.keys() == new | {f"{name}_{end}" for name in new for end in ("low", "high")}
    assert 0.3 < few["few_1_per_class"] < few["few_5_per_class"] < 1
    assert few["few_5_per_class_low"] < few["few_5_per_class"] < few["few_5_per_class_high"]
    assert plain.items() <= few.items()


def test_columns_models_and_the_rows_stand_beside_the_model(store, digits):
    data = digits.assign(good=list(one_hot(digits)), chance=list(one_hot(digits, right=0.0)))
    with mlflow.start_run() as run:
        other = mlflow.pyfunc.log_model(name="foreign", python_model=timm_model(), pip_requirements=["timm"]).model_uri
        config = {"against": ["chance", other], "baselines": True}
        result = evaluate(None, data, targets="digit", predictions="good", evaluator_config=config)
    place = other.replace(":", "")
    metrics = store.get_run(run.info.run_id).data.metrics
    assert metrics["knn_5"] == metrics["linear"] == 1
    assert metrics["chance/knn_5"] < 0.3
    vectors = timm_model()
    vectors.load_context(None)
    features = digits.drop(columns="digit")  # the model sees no column of vectors
    expected = by_sklearn(vectors.predict(None, features), digits["digit"].to_numpy(), 5)
    assert metrics[f"{place}/knn_5"] == pytest.approx(expected, abs=0.01)
    pixels = by_sklearn(features.to_numpy(), digits["digit"].to_numpy(), 5)
    assert metrics["raw_features/knn_5"] == pytest.approx(pixels, abs=0.01)
    rows = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/evaluation/differences.json")["differences"]
    assert result.artifacts["differences"].content["differences"] == rows
    (row,) = [row for row in rows if (row["against"], row["figure"]) == ("chance", "knn_5")]
    assert row["difference"] == pytest.approx(1 - metrics["chance/knn_5"])
    assert 0 < row["low"] < row["difference"] < row["high"]
    assert not row["may_be_noise"]
    assert {row["against"] for row in rows} == {"chance", other, "raw features"}
    picture = mlflow.artifacts.load_image(f"runs:/{run.info.run_id}/evaluation/confusion_matrix.png")
    assert picture.size == result.artifacts["confusion_matrix"].content.size


def test_a_difference_of_noise_is_called_so(store, digits):
    data = digits.assign(one=list(one_hot(digits, 0.9, seed=1)), two=list(one_hot(digits, 0.9, seed=2)))
    result = evaluate(None, data, targets="digit", predictions="one", evaluator_config={"against": "two"})
    noise = {row["figure"]: row["may_be_noise"] for row in result.artifacts["differences"].content["differences"]}
    assert noise["knn_20"]


def test_pictures_in_a_column_are_the_baseline(store, digits):
    frame = pd.DataFrame({"picture": [row.reshape(8, 8) for row in digits.drop(columns="digit").to_numpy()]})
    data = frame.assign(digit=digits["digit"])

    def model(rows):
        return np.stack([picture.mean(0) for picture in rows["picture"]])

    metrics = evaluate(model, data, targets="digit", evaluator_config={"baselines": True}).metrics
    expected = by_sklearn(digits.drop(columns="digit").to_numpy(), digits["digit"].to_numpy(), 5)
    assert metrics["raw_features/knn_5"] == pytest.approx(expected, abs=0.01)


def test_without_targets_the_rank_is_measured(store, digits):
    metrics = evaluate(lambda frame: frame.to_numpy(), digits.drop(columns="digit")).metrics
    assert metrics.keys() == {"rankme"}


def test_settings_are_taken(store, digits):
    options = {"bank_share": 0.5, "temperature": 0.5, "seed": 3}
    metrics = evaluate(lambda frame: frame.to_numpy(), digits, targets="digit", evaluator_config=options).metrics
    assert metrics["knn_200"]  # as many are in the bank


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            lambda frame: frame.to_numpy(),
            {"evaluator_config": {"k": 3}},
            "may hold bank_share, temperature, seed, few_labels, against, baselines, got k",
        ),
        (
            lambda frame: frame.to_numpy(),
            {"evaluator_config": {"few_labels": "yes"}},
            "few_labels must be true or false",
        ),
        (lambda frame: frame.to_numpy(), {"evaluator_config": {"against": [3]}}, "must be columns or URIs of models"),
        (
            lambda frame: frame.to_numpy(),
            {"evaluator_config": {"against": ["models:/none/1"]}},
            "against must name columns or models, got models:/none/1: ",
        ),
        (lambda frame: frame.to_numpy(), {"evaluator_config": {"against": ["p0"]}}, "the column p0 must give vectors"),
        (lambda frame: frame.to_numpy(), {"evaluator_config": {"bank_share": 2}}, "bank_share must be between 0 and 1"),
        (lambda frame: frame.to_numpy()[:-1], {}, "a vector for each row, got 398 for 400"),
        (lambda frame: ["cat"] * len(frame), {}, "must give numbers"),
        (lambda frame: np.zeros(len(frame)), {}, r"vectors, an array \(N, D\), got the shape \(256,\)"),
        (lambda frame: frame.to_numpy() * np.nan, {}, "must give finite numbers"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(store, digits, model, options, message):
    with pytest.raises(MlflowException, match=message):
        evaluate(model, digits, targets="digit", **options)


def test_rows_of_words_have_no_baseline(store, digits):
    data = digits[["digit"]].assign(text="a word")
    with pytest.raises(MlflowException, match="baselines needs rows of numbers, or one column of arrays of one shape"):
        evaluate(lambda rows: np.zeros((len(rows), 2)), data, targets="digit", evaluator_config={"baselines": True})


def test_too_few_rows_of_a_class_are_refused(store, digits):
    with pytest.raises(MlflowException, match="of each class two rows"):
        evaluate(lambda frame: frame.to_numpy(), digits[:12], targets="digit")


def test_other_models_are_left_to_other_evaluators_and_torch_is_not_imported():
    code = """
import sys, mlflow
from mlflow.models.evaluation.evaluator_registry import _model_evaluation_registry as registry
ssl = registry.get_evaluator("ssl")
assert ssl.can_evaluate(model_type="embedding", evaluator_config={})
assert not ssl.can_evaluate(model_type="classifier", evaluator_config={})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
