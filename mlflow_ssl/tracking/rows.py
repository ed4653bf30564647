"""Vectors of the rows of an evaluation data set: a model's, a column's, or the rows themselves."""

from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from mlflow_ssl.tracking.answers import as_vectors

BATCH_SIZE = 256
"""Rows that a model is asked for at once."""


def refusal(reason: str) -> MlflowException:
    """Return an error for a mistake of the caller."""
    return MlflowException(reason, error_code=INVALID_PARAMETER_VALUE)


def named_vectors(given: Any, name: str) -> npt.NDArray[np.float32]:
    """Return vectors ``(N, D)``.

    Raises:
        MlflowException: if they are none.
    """
    try:
        return as_vectors(given)
    except ValueError as error:
        raise refusal(f"{name} {error}") from error


def vectors_of(
    model: Any, rows: Any, *, predictions: str | None = None, name: str = "the model"
) -> npt.NDArray[np.float32]:
    """Return a model's vectors ``(N, D)`` of rows.

    Args:
        model: with ``predict``.
        rows: a frame or an array.
        predictions: name of the column of its answer that holds the vectors; None for all of the answer.
        name: of the model, for errors.

    Raises:
        MlflowException: if it does not give a vector of one size for each row.
    """
    parts = []
    for start in range(0, len(rows), BATCH_SIZE):
        given = model.predict(rows[start : start + BATCH_SIZE])
        parts.append(named_vectors(given[predictions] if predictions else given, name))
    if not parts or len({part.shape[1] for part in parts}) != 1:
        raise refusal(f"{name} must give a vector of one size for each row")
    together = np.concatenate(parts)
    if len(together) != len(rows):
        raise refusal(f"{name} must give a vector for each row, got {len(together)} for {len(rows)}")
    return together


def others(rows: Any, names: list[str]) -> tuple[Any, dict[str, npt.NDArray[np.float32]]]:
    """Return rows without the columns of vectors that are named, and the vectors of those columns and models.

    Args:
        rows: a frame or an array.
        names: columns of a frame, or URIs of models, which are loaded.

    Raises:
        MlflowException: if one is neither, or gives no vectors.
    """
    columns = [name for name in names if name in getattr(rows, "columns", ())]
    left = rows.drop(columns=columns) if columns else rows
    found = {}
    for name in names:
        if name in columns:
            found[name] = named_vectors(rows[name], f"the column {name}")
        else:
            found[name] = vectors_of(_loaded(name), left, name=name)
    return left, found


def _loaded(uri: str) -> Any:
    try:
        return mlflow.pyfunc.load_model(uri)
    except Exception as error:  # a model of others may raise anything
        reason = str(error).partition("\n")[0]
        raise refusal(f"evaluator_config.against must name columns or models, got {uri}: {reason}") from error


def raw_features(rows: Any) -> npt.NDArray[np.float32]:
    """Return rows of numbers, or one column of arrays of one shape, as vectors ``(N, D)``.

    Raises:
        MlflowException: if the rows are something else.
    """
    values = rows.iloc[:, 0] if getattr(rows, "ndim", 0) == 2 and rows.shape[1] == 1 and hasattr(rows, "iloc") else rows
    try:
        array = np.stack([np.asarray(row) for row in values]) if hasattr(values, "array") else np.asarray(values)
        return array.astype(np.float32).reshape(len(array), -1)
    except (TypeError, ValueError) as error:
        raise refusal(
            "evaluator_config.baselines needs rows of numbers, or one column of arrays of one shape"
        ) from error
