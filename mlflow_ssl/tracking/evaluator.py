"""MLflow's evaluator of embeddings: ``mlflow.models.evaluate(..., model_type="embedding", evaluators="ssl")``.

It takes any model that turns rows into vectors, this project's or not. ``import mlflow`` itself may import this module,
by its entry point: nothing heavy is imported at its top.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mlflow import MlflowClient
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator
from mlflow.models.evaluation.artifacts import ImageEvaluationArtifact, JsonEvaluationArtifact

from mlflow_ssl.tracking.report import metric_place
from mlflow_ssl.tracking.rows import named_vectors, others, raw_features, refusal, vectors_of

if TYPE_CHECKING:
    from torch import Tensor

    from mlflow_ssl.evaluation.scores import Scores

MODEL_TYPE = "embedding"
RAW = "raw features"
MEASURED = ""  # no column or model has this name
SETTINGS: dict[str, Any] = {
    "bank_share": 0.7,
    "temperature": 0.1,
    "seed": 0,
    "few_labels": False,
    "against": (),
    "baselines": False,
}
"""What ``evaluator_config`` may hold, and what holds by default."""
Vectors = npt.NDArray[np.float32]


class EmbeddingEvaluator(ModelEvaluator):
    """Measure embeddings by their neighbours' classes, a linear classifier, what they retrieve, and by their rank.

    The rows are dealt, stratified and seeded, into a bank of known classes (``bank_share``) and queries. Without
    ``targets`` the rank alone is measured. ``few_labels`` adds linear classifiers that know few labels.

    Beside the model stand others on the same rows: those of ``against``, columns of vectors or models, which are loaded
    by `mlflow.pyfunc.load_model`; and, with ``baselines``, the rows themselves. By how much the model exceeds each is
    the table ``evaluation/differences.json``.

    The metrics of `mlflow_ssl.evaluation.scores.score` are logged to the run, those of others below their names. By the
    linear classifier there are the table of classes, ``evaluation/classes.json``, and what is taken for what,
    ``evaluation/confusion_matrix.png``.
    """

    @classmethod
    def can_evaluate(cls, *, model_type: str, evaluator_config: dict[str, Any], **_: Any) -> bool:
        """Return whether this is for the model: of the type ``embedding`` alone."""
        return model_type == MODEL_TYPE

    def evaluate(  # MLflow's signature without its annotations
        self,
        *,
        model_type: str,
        dataset: Any,
        run_id: str,
        evaluator_config: dict[str, Any] | None,
        model: Any = None,
        predictions: str | None = None,
        model_id: str | None = None,
        **_: Any,
    ) -> EvaluationResult:
        """Measure, log to the run, and return it.

        Raises:
            MlflowException: if a setting is unknown, a model gives no vectors, or there are too few rows.
        """
        settings = _settings(evaluator_config)
        vectors = _vectors(model, dataset, predictions, settings)
        targets = dataset.labels_data if dataset.has_targets else None
        scores, dealt = _measure(vectors, targets, settings)
        client, metrics = MlflowClient(), _metrics(scores)
        for name, value in metrics.items():
            client.log_metric(run_id, name, value, model_id=None if "/" in name else model_id)
        artifacts = _log_tables(client, run_id, scores, *dealt) if dealt else {}
        return EvaluationResult(metrics=metrics, artifacts=artifacts, run_id=run_id)  # type: ignore[no-untyped-call]


def _settings(given: dict[str, Any] | None) -> dict[str, Any]:
    unknown = sorted((given or {}).keys() - SETTINGS.keys())
    if unknown:
        raise refusal(f"evaluator_config may hold {', '.join(SETTINGS)}, got {', '.join(unknown)}")
    settings = SETTINGS | (given or {})
    if not 0 < settings["bank_share"] < 1:
        raise refusal(f"evaluator_config.bank_share must be between 0 and 1, got {settings['bank_share']}")
    for key in ("few_labels", "baselines"):
        if not isinstance(settings[key], bool):
            raise refusal(f"evaluator_config.{key} must be true or false, got {settings[key]}")
    against = settings["against"]
    settings["against"] = [against] if isinstance(against, str) else list(against)
    if not all(isinstance(name, str) for name in settings["against"]):
        raise refusal(f"evaluator_config.against must be columns or URIs of models, got {against}")
    return settings


def _vectors(model: Any, dataset: Any, predictions: str | None, settings: dict[str, Any]) -> dict[str, Vectors]:
    """Return the vectors ``(N, D)`` of all rows: first those that are measured, then what they are compared with."""
    rows, compared = others(dataset.features_data, settings["against"])
    if model is not None:
        measured = vectors_of(model, rows, predictions=predictions)
    elif dataset.has_predictions:
        measured = named_vectors(dataset.predictions_data, "the column of predictions")
    else:
        raise refusal("a model must be given, or a data set with a column of predictions")
    baselines = {RAW: raw_features(rows)} if settings["baselines"] else {}
    return {MEASURED: measured, **compared, **baselines}


def _measure(
    vectors: dict[str, Vectors], targets: Any, settings: dict[str, Any]
) -> tuple[dict[str, "Scores"], tuple["Tensor", list[str]] | None]:
    """Return the scores of all vectors; and, where classes are known, those of the queries and their names."""
    import torch

    from mlflow_ssl.evaluation.scores import Labelled, score

    if targets is None:
        unknown = torch.zeros(len(vectors[MEASURED]), dtype=torch.long)
        return {
            name: score(Labelled(rows[:0], unknown[:0]), Labelled(rows, unknown))
            for name, rows in ((name, torch.from_numpy(rows)) for name, rows in vectors.items())
        }, None
    names, labels = np.unique(np.asarray(targets).astype(str), return_inverse=True)
    bank, queries = _deal(labels, settings)
    scores = {}
    for name, rows in vectors.items():
        parts = [
            Labelled(torch.from_numpy(rows[part]), torch.from_numpy(labels[part]).long()) for part in (bank, queries)
        ]
        options = {key: settings[key] for key in ("temperature", "seed", "few_labels")}
        scores[name] = score(*parts, **options)
    return scores, (torch.from_numpy(labels[queries]).long(), names.tolist())


def _metrics(scores: dict[str, "Scores"]) -> dict[str, float]:
    first, *rest = scores.items()
    metrics = dict(first[1].metrics)
    for name, measured in rest:
        metrics |= {f"{metric_place(name)}/{figure}": interval.value for figure, interval in measured.figures.items()}
    return metrics


def _log_tables(
    client: MlflowClient, run_id: str, scores: dict[str, "Scores"], truth: "Tensor", names: list[str]
) -> dict[str, Any]:
    """Log tables and the confusion matrix, and return them as MLflow's evaluation has them."""
    from mlflow_ssl.evaluation.scores import by_class, compare, difference_rows
    from mlflow_ssl.pictures.confusion import confusion_matrix

    measured = scores[MEASURED]
    shown = measured.shown or ""  # with a bank there is one
    predicted = measured.predicted[shown]
    tables = {"classes": by_class(predicted, truth, names), "differences": difference_rows(compare(scores, truth))}
    artifacts: dict[str, Any] = {}
    for name, rows in tables.items():
        if rows:
            client.log_dict(run_id, {name: rows}, f"evaluation/{name}.json")
            uri = f"runs:/{run_id}/evaluation/{name}.json"
            artifacts[name] = JsonEvaluationArtifact(uri=uri, content={name: rows})  # type: ignore[no-untyped-call]
    picture, file = confusion_matrix(truth, predicted, names), "evaluation/confusion_matrix.png"
    client.log_image(run_id, picture, artifact_file=file)
    uri = f"runs:/{run_id}/{file}"
    artifacts["confusion_matrix"] = ImageEvaluationArtifact(uri=uri, content=picture)  # type: ignore[no-untyped-call]
    return artifacts


def _deal(labels: npt.NDArray[np.int64], settings: dict[str, Any]) -> tuple[Any, Any]:
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels)
    if len(counts) < 2 or counts.min() < 2:
        raise refusal("targets must be of two classes at least, and of each class two rows")
    rows = np.arange(len(labels))
    try:
        bank, queries = train_test_split(
            rows, train_size=settings["bank_share"], stratify=labels, random_state=settings["seed"]
        )
    except ValueError as error:
        raise refusal(f"the rows cannot be dealt into bank and queries: {error}") from error
    return np.sort(bank), np.sort(queries)
