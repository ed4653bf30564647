"""A report, logged to a run that ``mlflow run`` has opened, which then ends."""

from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient


def log_report(
    run_id: str,
    folder: Path,
    *,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    artifact_path: str = "data",
) -> None:
    """Log files, metrics and tags, and end the run.

    Args:
        run_id: of the open run.
        folder: whose files become artifacts.
        artifact_path: below which.
        metrics: name to value.
        tags: name to text.
    """
    client = MlflowClient()
    client.log_artifacts(run_id, str(folder), artifact_path)
    for name, value in metrics.items():
        client.log_metric(run_id, name, value)
    for name, text in tags.items():
        client.set_tag(run_id, name, text)
    client.set_terminated(run_id, "FINISHED")
