"""An earlier run, as far as it can be gone on in or repeated: from its output folder, or from MLflow."""

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from mlflow_ssl.checkpoint_io import AtomicCheckpointIO
from mlflow_ssl.errors import InputError, MachineError
from mlflow_ssl.tracking.opening import OUTPUT_TAG, connect, find_experiment, refusals_named, without_password
from mlflow_ssl.tracking.run import FOLDER, RunRecord

log = logging.getLogger(__name__)

TRIAL_TAG = "sweep.trial"
"""Tag of a training of a sweep: its number."""


@dataclass(frozen=True)
class StoredRun:
    """A run of ours in a tracking store."""

    client: MlflowClient
    run: MlflowRun

    @property
    def run_id(self) -> str:
        """Its id."""
        return str(self.run.info.run_id)

    @property
    def tags(self) -> dict[str, str]:
        """Its tags."""
        return dict(self.run.data.tags)

    @property
    def data_digest(self) -> str | None:
        """The digest of the data that it was trained on; its folder knows it also where MLflow missed it."""
        output = self.output_folder()
        recorded = RunRecord.read(output).data_digest if output else None
        return recorded or self.tags.get("data.digest")

    def output_folder(self) -> Path | None:
        """Return its output folder; None if that is gone, or is another run's by now.

        Nor is it one that somebody else has made: the tag could name any folder, and what lies there is trusted.
        """
        tagged = self.tags.get(OUTPUT_TAG)
        if not tagged or not _is_mine(Path(tagged, FOLDER, "run.json")):
            return None
        record = RunRecord.read(Path(tagged))
        return Path(tagged) if record.run_id == self.run_id else None

    def read_yaml(self, name: str, output: Path | None = None) -> Any:
        """Return what one of its config files holds.

        Args:
            name: such as ``config_resolved.yaml``.
            output: its output folder, if it may still be there.

        Raises:
            InputError: if it is in neither place.
        """
        text = self.read_text(name, output)
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"config/{name} of run {self.run_id} is no YAML: {error}") from error

    def read_text(self, name: str, output: Path | None = None) -> str:
        """Return the text of one of its config files; see `read_yaml`."""
        if output is not None and (output / name).is_file():
            return (output / name).read_text()
        with tempfile.TemporaryDirectory() as folder:
            return self._download(f"config/{name}", Path(folder)).read_text()

    def checkpoint(self, output: Path) -> Path | None:
        """Return its last checkpoint in ``output``, fetched from the artifacts if it is not there; None without one."""
        file = output / "checkpoints" / "last.ckpt"
        if file.exists() and _is_whole(file):
            return file
        uploaded = {Path(info.path).name for info in self.client.list_artifacts(self.run_id, "checkpoints")}
        if "last.ckpt" not in uploaded:
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        for name in sorted(name for name in uploaded if name.endswith(".ckpt")):
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                shutil.move(self._download(f"checkpoints/{name}", Path(folder)), file.parent / name)
        log.info("fetched the checkpoints of run %s", self.run_id)
        return file

    def _download(self, artifact: str, folder: Path) -> Path:
        # a bar for each small file
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        try:
            return Path(self.client.download_artifacts(self.run_id, artifact, str(folder)))
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"run {self.run_id} has no artifact {artifact} that can be fetched: {reason}") from error


def _is_mine(file: Path) -> bool:
    try:
        return file.stat().st_uid == os.getuid()
    except OSError:
        return False


def find_run(wanted: str, *, experiment: str, uri: str | None) -> StoredRun:
    """Return the run of an id, or the ``last`` one of an experiment that is not finished.

    Args:
        wanted: a run id, or ``last``.
        experiment: name of the experiment that new runs go to.
        uri: tracking store; None for MLflow's own.

    Raises:
        InputError: if there is none, or it is not one of ours.
    """
    client = connect(uri)
    with refusals_named(client.tracking_uri):
        if wanted == "last":
            return StoredRun(client, _last_run(client, experiment))
        try:
            run = client.get_run(wanted)
        except MlflowException as error:
            store = without_password(client.tracking_uri)
            raise InputError(f"there is no run {wanted} in {store}; look for its id in the UI") from error
    if OUTPUT_TAG not in run.data.tags:
        raise InputError(f"run {wanted} is not one that mlflow_ssl trained: it has no tag {OUTPUT_TAG}")
    if run.info.lifecycle_stage != "active":
        raise InputError(f"run {wanted} was deleted; restore it first: mlflow runs restore --run-id {wanted}")
    return StoredRun(client, run)


def _last_run(client: MlflowClient, experiment: str) -> MlflowRun:
    experiment_id = find_experiment(client, experiment)
    token = None
    while True:
        runs = client.search_runs(
            [experiment_id] if experiment_id else [],
            filter_string=f"tags.`{OUTPUT_TAG}` LIKE '%'",
            run_view_type=ViewType.ACTIVE_ONLY,
            max_results=100,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        for run in runs:
            if TRIAL_TAG not in run.data.tags:  # a training of a sweep goes on with its sweep
                return run
        token = runs.token
        if not token:
            raise InputError(f"there is no run to resume in experiment {experiment!r}; start one without resume")


def _is_whole(file: Path) -> bool:
    try:
        AtomicCheckpointIO().load_checkpoint(file, map_location="meta")
    except MachineError as error:
        log.warning("%s; the uploaded one is taken, if there is one", error)
        return False
    return True


def begun_run(uri: str | None) -> str | None:
    """Return the run that a launcher has opened for this process, where an earlier process has begun it already.

    That one was lost or stopped, with its machine for instance, and the launcher's cluster has started this in its
    place.

    Args:
        uri: tracking store; None for MLflow's own.

    Raises:
        InputError: if the store does not answer.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id is None:
        return None
    client = connect(uri)
    with refusals_named(client.tracking_uri):
        return run_id if OUTPUT_TAG in client.get_run(run_id).data.tags else None
