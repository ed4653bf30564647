"""Where runs go: the tracking store, its experiment, and a run opened or taken over."""

import contextlib
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Run as StoredRun
from mlflow.exceptions import MlflowException

from mlflow_ssl.errors import InputError
from mlflow_ssl.secret import redact

SERVER_SECONDS = 5
OUTPUT_TAG = "mlflow_ssl.output_dir"
"""Tag of our runs: where they write."""
REASON_TAG = "mlflow_ssl.reason"
"""Tag of a run that did not end well: why."""


def connect(uri: str | None) -> MlflowClient:
    """Return a client of a tracking store, by default MLflow's own, after making sure that it answers.

    Raises:
        InputError: if the server does not answer within 5 seconds, or refuses.
    """
    if uri is not None:
        mlflow.set_tracking_uri(uri)
    uri = mlflow.get_tracking_uri()
    check_answers(uri)
    with refusals_named(uri), _first_use_lock(uri):
        return MlflowClient()


def open_run(
    client: MlflowClient, config: Mapping[str, Any], *, run_id: str | None, output: Path, name: str | None = None
) -> StoredRun:
    """Open a run, or go on in the one of ``run_id``, or in the one that ``mlflow run`` opened.

    It can be resumed from its first moment: it is born with the tag of its output folder.

    Raises:
        InputError: if the store refuses.
    """
    # popped, so that a second run of this process never takes it over too
    launched = os.environ.pop("MLFLOW_RUN_ID", None)
    begins = name or f"{config['core']['tag']}-{config['backbone']['model_name']}"
    with refusals_named(client.tracking_uri):
        taken = run_id or launched
        active = mlflow.start_run(
            run_id=taken,
            experiment_id=None if taken else _made_experiment(client, config["core"]["name"]),
            run_name=None if taken else _run_name(begins),
            tags={OUTPUT_TAG: str(output)},
            log_system_metrics=False,  # theirs counts samples for steps, and has no patience with a server
        )
        if run_id and launched and run_id != launched:
            _dismiss(client, launched, resumed=run_id)
    return active


def _dismiss(client: MlflowClient, launched: str, *, resumed: str) -> None:
    """Put the run that ``mlflow run`` opened below the one that goes on in its place.

    It cannot be deleted: the launcher wants to end it itself.
    """
    client.set_tag(launched, "mlflow.parentRunId", resumed)
    client.set_tag(launched, "mlflow.note.content", f"Opened by the launcher; run {resumed} was resumed instead.")
    client.set_terminated(launched, "FINISHED")


@contextlib.contextmanager
def refusals_named(uri: str) -> Iterator[None]:
    """Turn what a store answers into one line."""
    try:
        yield
    except MlflowException as error:
        reason = redact(str(error).splitlines()[0])
        raise InputError(f"tracking store {without_password(uri)} refuses: {reason}") from error


def check_answers(uri: str) -> None:
    """Check that a tracking server is there.

    Raises:
        InputError: if it does not answer within 5 seconds.
    """
    if not _is_server(uri):
        return
    try:
        requests.get(uri, timeout=SERVER_SECONDS, stream=True).close()
    except requests.RequestException as error:
        raise InputError(
            f"the tracking server {without_password(uri)} does not answer ({type(error).__name__}); start it, or set "
            "tracking.uri or MLFLOW_TRACKING_URI"
        ) from error


def without_password(uri: str) -> str:
    """Return an address without the user and password in it."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host).geturl() if "@" in parts.netloc else uri


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the address of a run in the MLflow UI; for a local store, that of a server started on it."""
    server = without_password(uri).rstrip("/") if _is_server(uri) else "http://127.0.0.1:5000"
    # the UI opens in its view of language models otherwise
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def ui_command(uri: str) -> str | None:
    """Return the command that starts the UI on a local store; None where a server is running already."""
    return None if _is_server(uri) else f"mlflow ui --backend-store-uri {without_password(uri)}"


def find_experiment(client: MlflowClient, name: str) -> str | None:
    """Return the experiment that runs go to; None if it is still to be made."""
    launched = os.environ.get("MLFLOW_RUN_ID")
    if launched:
        return client.get_run(launched).info.experiment_id
    # a job whose environment names an experiment stays in it
    given = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if given:
        return given
    experiment = client.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", name))
    return experiment.experiment_id if experiment else None


def _made_experiment(client: MlflowClient, name: str) -> str:
    found = find_experiment(client, name)
    if found:
        return found
    try:
        return client.create_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was faster
            raise
        return _made_experiment(client, name)


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


@contextlib.contextmanager
def _first_use_lock(uri: str) -> Iterator[None]:
    """Let one process at a time create a local store: two that migrate a fresh one at once crash."""
    if _is_server(uri):
        yield
        return
    name = hashlib.blake2b(uri.encode() + os.getcwd().encode(), digest_size=8).hexdigest()  # noqa: PTH109
    with FileLock(Path(tempfile.gettempdir(), f"mlflow_ssl-{name}.lock"), mode=0o666):
        MlflowClient().search_experiments(max_results=1)
        yield


def _run_name(name: str) -> str:
    # MLflow's own random name repeats under a fixed seed
    return redact(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
