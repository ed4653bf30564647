"""The metrics that a run already has in MLflow."""

from collections.abc import Iterator

from mlflow import MlflowClient

from mlflow_ssl.tracking.journal import Entry


def stored_metrics(client: MlflowClient, run_id: str) -> Iterator[Entry]:
    """Yield every metric of a run as its journal held it, in order of steps."""
    for key in client.get_run(run_id).data.metrics:
        points = sorted(client.get_metric_history(run_id, key), key=lambda point: point.step)
        yield {"kind": "metrics", "metrics": [(key, point.value, point.timestamp, point.step) for point in points]}


def curve(client: MlflowClient, run_id: str, key: str) -> dict[int, float]:
    """Return a metric by step."""
    return {point.step: point.value for point in client.get_metric_history(run_id, key)}
