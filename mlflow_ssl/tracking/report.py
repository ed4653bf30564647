"""A report, logged to a run that ``mlflow run`` has opened, or to a new one, which then ends."""

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput
from mlflow.exceptions import MlflowException

from mlflow_ssl.tracking.opening import connect, find_experiment, refusals_named


def new_run(experiment: str, run_name: str) -> str:
    """Open a run in an experiment, which is made if it is new, and return its id.

    Raises:
        InputError: if the tracking store does not answer, or refuses.
    """
    client = connect(None)
    with refusals_named(client.tracking_uri):
        known = find_experiment(client, experiment)
        run = client.create_run(known or client.create_experiment(experiment), run_name=run_name)
    return str(run.info.run_id)


def link_models(run_id: str, uris: Sequence[str]) -> None:
    """Make the logged models of registered versions inputs of a run; other models have no link."""
    client = MlflowClient()
    ids = [model_id for uri in uris if (model_id := logged_model_id(client, uri))]
    if ids:
        client.log_inputs(run_id, models=[LoggedModelInput(model_id) for model_id in dict.fromkeys(ids)])


def logged_model_id(client: MlflowClient, uri: str) -> str | None:
    """Return the logged model that a registered version is; None where it cannot be found, or ``uri`` is no version."""
    name, _, version = uri.removeprefix("models:/").partition("/")
    if not uri.startswith("models:/") or not version:
        return None
    try:
        found = client.get_model_version(name, version)
        if found.model_id:
            return str(found.model_id)
        # MLflow's own store forgets it, and the run that the version is of knows
        outputs = client.get_run(found.run_id).outputs if found.run_id else None
        for output in outputs.model_outputs if outputs else []:
            if client.get_logged_model(output.model_id).artifact_location == found.source:
                return str(output.model_id)
    except MlflowException:
        pass  # a version without a run, or of one that is gone
    return None


def metric_place(name: str) -> str:
    """Return a model's name as the first part of the names of its metrics, of characters that MLflow takes.

    Example:
        >>> metric_place("models:/byol@champion"), metric_place("raw pixels")
        ('models/byol_champion', 'raw_pixels')
    """
    place = re.sub(r"[^\w./-]", "_", name.replace(":", ""), flags=re.ASCII)
    return posixpath.normpath(place).strip("./") or "model"


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
