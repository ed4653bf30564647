"""The life of an MLflow run: opened or taken over, filled, and always ended."""

import contextlib
import hashlib
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import mlflow
import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from pytorch_lightning.utilities import rank_zero_only

from mlflow_ssl.errors import InputError, Interrupted
from mlflow_ssl.tracking.params import loggable_params
from mlflow_ssl.tracking.source import git_tags, version_tags

log = logging.getLogger(__name__)

SERVER_SECONDS = 5
BATCH = 100
"""Parameters that one request may hold."""


class Run:
    """An open run: what a training says goes through here.

    In a distributed training only the first process talks to MLflow; the others' runs say nothing.

    Args:
        client: of the tracking store.
        run_id: of the run.
        experiment_id: of its experiment.
    """

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self.experiment_id = experiment_id

    @rank_zero_only
    def log_params(self, config: Mapping[str, Any]) -> None:
        """Log every leaf of a resolved config under its dotted key, but for those that the launcher has logged."""
        known = self.client.get_run(self.run_id).data.params
        params = [Param(key, value) for key, value in loggable_params(config, known=known).items()]
        for start in range(0, len(params), BATCH):
            self.client.log_batch(self.run_id, params=params[start : start + BATCH])

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at once; a training's own come batched, through `MLflowLogger`."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(key, value, now, step) for key, value in metrics.items()])

    @rank_zero_only
    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Upload a file."""
        self.client.log_artifact(self.run_id, str(file), folder)

    @rank_zero_only
    def log_folder(self, path: Path, folder: str) -> None:
        """Upload a folder's contents."""
        self.client.log_artifacts(self.run_id, str(path), folder)

    @rank_zero_only
    def log_dataset(self, *, name: str, source: str, digest: str) -> None:
        """Log the data set as the run's input."""
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]

        dataset = MetaDataset(LocalArtifactDatasetSource(source), name=name[:500], digest=digest)  # type: ignore[abstract]
        mlflow.log_input(dataset, context="training")

    @property
    def link(self) -> str:
        """Address of the run in the MLflow UI; for a local store, that of a server started on it."""
        uri = _without_password(self.client.tracking_uri)
        server = uri.rstrip("/") if urlsplit(uri).scheme in ("http", "https") else "http://127.0.0.1:5000"
        # the UI opens in its view of language models otherwise
        return f"{server}/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"

    @property
    def ui_command(self) -> str | None:
        """Command that starts the UI on a local store; None where a server is running already."""
        uri = _without_password(self.client.tracking_uri)
        return None if urlsplit(uri).scheme in ("http", "https") else f"mlflow ui --backend-store-uri {uri}"


@contextlib.contextmanager
def tracked_run(config: Mapping[str, Any], *, main_log: Path) -> Iterator[Run]:
    """Take over the run that ``mlflow run`` opened, or open one, and end it whatever happens.

    It ends FINISHED, KILLED after Ctrl-C or SIGTERM, or FAILED, the last two with the reason as tag
    ``mlflow_ssl.reason``.

    Args:
        config: resolved config.
        main_log: the log file, uploaded at the end.

    Raises:
        InputError: if the tracking store does not answer or refuses.
    """
    if not is_first_process():
        yield Run(cast(MlflowClient, None), run_id="", experiment_id="")
        return
    run = _open_run(config)
    status, reason = "FINISHED", ""
    try:
        yield run
    except (Interrupted, KeyboardInterrupt) as error:
        status, reason = "KILLED", str(error) or "stopped by Ctrl-C"
        raise
    except BaseException as error:
        status, reason = "FAILED", str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        try:
            if reason:
                log.error("%s: %s", status, reason)
                run.set_tags({"mlflow_ssl.reason": reason[:1000]})
            run.log_file(main_log)
        finally:
            mlflow.end_run(status)


def is_first_process() -> bool:
    """Return whether this process is the one that talks to MLflow and writes the output folder."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def end_launched_run(run_id: str, *, status: str, reason: str) -> None:
    """End a run that ``mlflow run`` opened and that we never took over, if there is anyone to tell."""
    try:
        check_answers(mlflow.get_tracking_uri())
    except InputError:  # MLflow's client would go on trying for minutes
        return
    client = MlflowClient()
    client.set_tag(run_id, "mlflow_ssl.reason", reason[:1000])
    client.set_terminated(run_id, status)


def _open_run(config: Mapping[str, Any]) -> Run:
    if config["tracking"]["uri"] is not None:
        mlflow.set_tracking_uri(config["tracking"]["uri"])
    uri = mlflow.get_tracking_uri()
    check_answers(uri)
    # popped, so that a second run of this process never takes it over too
    launched = os.environ.pop("MLFLOW_RUN_ID", None)
    try:
        with _first_use_lock(uri):
            client = MlflowClient()
            experiment_id = None if launched else _experiment_id(client, config["core"]["name"])
        active = mlflow.start_run(
            run_id=launched,
            experiment_id=experiment_id,
            run_name=None if launched else _run_name(config),
            log_system_metrics=bool(config["tracking"]["system_metrics"]),
        )
    except MlflowException as error:
        raise InputError(f"tracking store {_without_password(uri)} refuses: {str(error).splitlines()[0]}") from error
    run = Run(client, active.info.run_id, active.info.experiment_id)
    run.set_tags(git_tags() | version_tags())
    return run


def check_answers(uri: str) -> None:
    """Check that a tracking server is there.

    Raises:
        InputError: if it does not answer within 5 seconds.
    """
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    try:
        requests.get(uri, timeout=SERVER_SECONDS, stream=True).close()
    except requests.RequestException as error:
        raise InputError(
            f"the tracking server {_without_password(uri)} does not answer ({type(error).__name__}); start it, or set "
            "tracking.uri or MLFLOW_TRACKING_URI"
        ) from error


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host).geturl() if "@" in parts.netloc else uri


@contextlib.contextmanager
def _first_use_lock(uri: str) -> Iterator[None]:
    """Let one process at a time create a local store: two that migrate a fresh one at once crash."""
    if urlsplit(uri).scheme in ("http", "https"):
        yield
        return
    name = hashlib.blake2b(uri.encode() + os.getcwd().encode(), digest_size=8).hexdigest()  # noqa: PTH109
    with FileLock(Path(tempfile.gettempdir(), f"mlflow_ssl-{name}.lock"), mode=0o666):
        MlflowClient().search_experiments(max_results=1)
        yield


def _experiment_id(client: MlflowClient, name: str) -> str:
    # a job whose environment names an experiment stays in it
    given = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if given:
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", name)
    experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id if experiment else client.create_experiment(name)


def _run_name(config: Mapping[str, Any]) -> str:
    # MLflow's own random name repeats under a fixed seed
    started = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return f"{config['core']['tag']}-{config['backbone']['model_name']}-{started}"
