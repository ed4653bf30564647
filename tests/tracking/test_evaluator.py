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
        logged = mlflow.pyfunc.log_model(name="foreign", python_model=timm_model())
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
            "may hold bank_share, temperature, seed, got k",
        ),
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
