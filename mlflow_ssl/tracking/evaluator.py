"""MLflow's evaluator of embeddings: ``mlflow.models.evaluate(..., model_type="embedding", evaluators="ssl")``.

It takes any model that turns rows into vectors, this project's or not. ``import mlflow`` itself may import this module,
by its entry point: nothing heavy is imported at its top.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator
from mlflow.models.evaluation.artifacts import JsonEvaluationArtifact
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

if TYPE_CHECKING:
    from mlflow_ssl.evaluation.scores import Scores

MODEL_TYPE = "embedding"
BATCH_SIZE = 256
"""Rows that the model is asked for at once."""
SETTINGS = {"bank_share": 0.7, "temperature": 0.1, "seed": 0}
"""What ``evaluator_config`` may hold, and what holds by default."""


class EmbeddingEvaluator(ModelEvaluator):
    """Measure embeddings by their neighbours' classes and by their rank.

    The rows are dealt, stratified and seeded, into a bank of known classes (``bank_share``) and queries. Without
    ``targets`` the rank alone is measured. The metrics of `mlflow_ssl.evaluation.scores.score` are logged to the run,
    and the table of classes as ``evaluation/classes.json``.
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
            MlflowException: if a setting is unknown, the model gives no vectors, or there are too few rows.
        """
        settings = _settings(evaluator_config)
        embeddings = _embeddings(model, dataset, predictions)
        targets = dataset.labels_data if dataset.has_targets else None
        metrics, classes = _measure(embeddings, targets, settings)
        client = MlflowClient()
        for name, value in metrics.items():
            client.log_metric(run_id, name, value, model_id=model_id)
        artifacts: dict[str, Any] = {}
        if classes:
            client.log_dict(run_id, {"classes": classes}, "evaluation/classes.json")
            uri = f"runs:/{run_id}/evaluation/classes.json"
            artifacts["classes"] = JsonEvaluationArtifact(uri=uri, content={"classes": classes})  # type: ignore[no-untyped-call]
        return EvaluationResult(metrics=metrics, artifacts=artifacts, run_id=run_id)  # type: ignore[no-untyped-call]


def _settings(given: dict[str, Any] | None) -> dict[str, Any]:
    unknown = sorted((given or {}).keys() - SETTINGS.keys())
    if unknown:
        raise _refusal(f"evaluator_config may hold {', '.join(SETTINGS)}, got {', '.join(unknown)}")
    settings = SETTINGS | (given or {})
    if not 0 < settings["bank_share"] < 1:
        raise _refusal(f"evaluator_config.bank_share must be between 0 and 1, got {settings['bank_share']}")
    return settings


def _embeddings(model: Any, dataset: Any, predictions: str | None) -> npt.NDArray[np.float32]:
    """Return the embeddings ``(N, D)`` of all rows: the model's, or those that the data set brings along."""
    if model is None:
        if not dataset.has_predictions:
            raise _refusal("a model must be given, or a data set with a column of predictions")
        return _as_vectors(dataset.predictions_data)
    rows = dataset.features_data
    parts = []
    for start in range(0, len(rows), BATCH_SIZE):
        given = model.predict(rows[start : start + BATCH_SIZE])
        parts.append(_as_vectors(given[predictions] if predictions else given))
    if not parts or len({part.shape[1] for part in parts}) != 1:
        raise _refusal("the model must give a vector of one size for each row")
    together = np.concatenate(parts)
    if len(together) != len(rows):
        raise _refusal(f"the model must give a vector for each row, got {len(together)} for {len(rows)}")
    return together


def _as_vectors(given: Any) -> npt.NDArray[np.float32]:
    """Return vectors ``(N, D)``, whatever form they have: an array, a tensor, a frame, or a column of lists."""
    if hasattr(given, "detach"):
        given = given.detach().cpu().float().numpy()
    if getattr(given, "ndim", 0) == 2 and getattr(given, "shape", (0, 0))[1] == 1 and hasattr(given, "iloc"):
        given = given.iloc[:, 0]
    try:
        values = given.to_numpy() if hasattr(given, "to_numpy") else np.asarray(given)
        vectors = np.stack(list(values)).astype(np.float32) if values.dtype == object else values.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise _refusal(f"the model must give numbers, a vector for each row: {error}") from error
    if vectors.ndim != 2:
        raise _refusal(f"the model must give vectors, an array (N, D), got the shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise _refusal("the model must give finite numbers, got some that are not")
    return vectors


def _measure(
    embeddings: npt.NDArray[np.float32], targets: Any, settings: dict[str, Any]
) -> tuple[dict[str, float], list[dict[str, object]]]:
    import torch

    from mlflow_ssl.evaluation.scores import Labelled, by_class, score

    vectors = torch.from_numpy(embeddings)
    if targets is None:
        unknown = torch.zeros(len(vectors), dtype=torch.long)
        return score(Labelled(vectors[:0], unknown[:0]), Labelled(vectors, unknown)).metrics, []
    names, labels = np.unique(np.asarray(targets).astype(str), return_inverse=True)
    bank, queries = _deal(labels, settings)
    parts = [Labelled(vectors[rows], torch.from_numpy(labels[rows]).long()) for rows in (bank, queries)]
    scores: Scores = score(*parts, temperature=settings["temperature"], seed=settings["seed"])
    predicted = scores.predicted[_shown(scores)]
    return scores.metrics, by_class(predicted, parts[1].labels, names.tolist())


def _deal(labels: npt.NDArray[np.int64], settings: dict[str, Any]) -> tuple[Any, Any]:
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels)
    if len(counts) < 2 or counts.min() < 2:
        raise _refusal("targets must be of two classes at least, and of each class two rows")
    rows = np.arange(len(labels))
    try:
        bank, queries = train_test_split(
            rows, train_size=settings["bank_share"], stratify=labels, random_state=settings["seed"]
        )
    except ValueError as error:
        raise _refusal(f"the rows cannot be dealt into bank and queries: {error}") from error
    return np.sort(bank), np.sort(queries)


def _shown(scores: "Scores") -> str:
    return "knn_20" if "knn_20" in scores.predicted else next(reversed(scores.predicted))


def _refusal(reason: str) -> MlflowException:
    return MlflowException(reason, error_code=INVALID_PARAMETER_VALUE)
