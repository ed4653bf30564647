"""The runs below a sweep's: opened for their processes, and ended where those could not do it themselves."""

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_ssl.errors import InputError, NotSynced
from mlflow_ssl.secret import redact
from mlflow_ssl.tracking.delivery import REGISTERED
from mlflow_ssl.tracking.lifecycle import NOTE_TAG, sync
from mlflow_ssl.tracking.note import UNREGISTERED, loading
from mlflow_ssl.tracking.opening import OUTPUT_TAG, REASON_TAG
from mlflow_ssl.tracking.run import FOLDER, LONGEST_TAG, Run, RunRecord, lock_output
from mlflow_ssl.tracking.sender import is_refusal

log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
SWEEP_TAG = "mlflow_ssl.sweep"
"""Tag of the run that stands above the trainings of a sweep: the sweep's name."""
STATE_TAG = "sweep.state"
"""Tag of a training of a sweep: waiting, running, finished, pruned, failed or killed."""
LONGEST_NAME = 250


class Children:
    """The runs below one.

    Args:
        client: of the tracking store.
        parent: the run above them.
    """

    def __init__(self, client: MlflowClient, parent: RunRecord) -> None:
        self._client = client
        self._parent = parent
        self._unsaid: list[tuple[str, dict[str, str]]] = []

    def open(self, name: str, tags: Mapping[str, str]) -> str | None:
        """Open a run and return its id; None while MLflow does not answer.

        Raises:
            MlflowException: if it refuses.
        """
        try:
            run = self._client.create_run(
                self._parent.experiment_id,
                tags={PARENT_TAG: self._parent.run_id} | {key: redact(value) for key, value in tags.items()},
                run_name=redact(name)[:LONGEST_NAME],
            )
        except Exception as error:
            if is_refusal(error):
                raise
            log.warning("the next training waits for MLflow, which does not answer: %s", redact(_line(error)))
            return None
        return str(run.info.run_id)

    def environment(self, run_id: str) -> dict[str, str]:
        """Return what has a process take over a run, as those that ``mlflow run`` starts do."""
        return {"MLFLOW_RUN_ID": run_id, "MLFLOW_EXPERIMENT_ID": self._parent.experiment_id}

    def say(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run: now, or when MLflow is back."""
        self._unsaid.append((run_id, {key: redact(value)[:LONGEST_TAG] for key, value in tags.items()}))
        self.flush()

    def flush(self) -> bool:
        """Try to say what is unsaid, and return whether all is said."""
        while self._unsaid:
            run_id, tags = self._unsaid[0]
            try:
                for key, value in tags.items():
                    self._client.set_tag(run_id, key, value)
            except Exception as error:
                if not is_refusal(error):
                    log.debug("tags of run %s wait: %s", run_id, error)
                    return False
                log.warning("MLflow refuses tags of run %s: %s", run_id, redact(_line(error)))
            self._unsaid.pop(0)
        return True

    def drain(self, patience: float) -> bool:
        """Say what is unsaid, for so many seconds, and return whether all is said."""
        end = time.monotonic() + patience
        while not self.flush():
            if time.monotonic() > end:
                return False
            time.sleep(1)
        return True

    def settle(self, run_id: str, output: Path, *, status: str, reason: str) -> None:
        """End the run of a process that died without a word, with everything that it had written down.

        Args:
            run_id: of the run.
            output: the output folder of the process.
            status: what the run ends as, where the process had not come so far as to open it.
            reason: why, then.
        """
        with contextlib.suppress(NotSynced, InputError, MlflowException):
            sync(output)
        try:
            if self._client.get_run(run_id).info.status not in ("RUNNING", "SCHEDULED"):
                return
            self._client.set_terminated(run_id, status)
        except Exception as error:
            log.warning("run %s could not be ended: %s; python -m mlflow_ssl sync %s", run_id, _line(error), output)
            return
        self.say(run_id, {REASON_TAG: reason, OUTPUT_TAG: str(output)})

    def reason(self, run_id: str) -> str:
        """Return why a run failed or was stopped, as it said itself; empty if it did not, or MLflow is away."""
        try:
            return str(self._client.get_run(run_id).data.tags.get(REASON_TAG, ""))
        except Exception as error:
            log.debug("no reason of run %s: %s", run_id, error)
            return ""

    def metrics(self, run_id: str) -> dict[str, float]:
        """Return the last value of each metric of a run; none while MLflow is away."""
        try:
            return dict(self._client.get_run(run_id).data.metrics)
        except Exception as error:
            log.debug("no metrics of run %s: %s", run_id, error)
            return {}

    def register(self, output: Path, *, patience: float) -> tuple[str, str | None] | None:
        """Register the network of a finished training, and return name and version.

        The version is None where MLflow does not answer, and the whole None where nothing was packaged.
        """
        packages = sorted((output / "registration").glob("step-*"), key=lambda folder: folder.stat().st_mtime)
        if not packages:
            return None
        package = packages[-1]
        name = str(json.loads((package / "registration.json").read_text())["name"])
        record = RunRecord.read(output)
        lock = lock_output(output)
        try:
            run = Run(self._client, record, output)
            try:
                known = package / REGISTERED
                version = (
                    str(json.loads(known.read_text())["version"])
                    if known.exists()
                    else run.registered_version(package, patience=patience)
                )
            finally:
                run.close()
        finally:
            lock.release()
        if version:
            self._tell_loading(record.run_id, name, version)
        return name, version

    def _tell_loading(self, run_id: str, name: str, version: str) -> None:
        with contextlib.suppress(MlflowException):
            note = self._client.get_run(run_id).data.tags.get(NOTE_TAG, "")
            self.say(run_id, {NOTE_TAG: note.replace(UNREGISTERED, loading(name, version)), "sweep.best": "true"})


def status_of(output: Path) -> str | None:
    """Return how a training ended, as its output folder knows; None if it did not say."""
    try:
        return RunRecord.read(output).status
    except InputError:
        return None


def was_opened(output: Path) -> bool:
    """Return whether a training came so far as to open its run."""
    return (output / FOLDER / "run.json").exists()


def lock_file(output: Path) -> Path:
    """Return the file that is locked while a process writes to an output folder."""
    return output / FOLDER / "lock"


def all_sent(output: Path) -> bool:
    """Return whether everything that a training said has arrived in MLflow."""
    journals = [(output / FOLDER / f"{name}.jsonl", output / FOLDER / f"{name}.sent") for name in ("records", "files")]
    return all(sent.exists() and int(sent.read_text() or 0) >= said.stat().st_size for said, sent in journals)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
