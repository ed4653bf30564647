"""What the entries of a run's journals do to MLflow. Each does the same when it is done twice."""

import json
import shutil
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from mlflow_ssl.tracking.journal import Entry
from mlflow_ssl.tracking.registry import register_package
from mlflow_ssl.tracking.sender import is_refusal

MOST_METRICS, MOST_PARAMS, MOST_TAGS = 1000, 100, 100
"""What one request may hold; 1,000 in all."""
JOINABLE = ("metrics", "params", "tags")
REGISTERED = "registered.json"
"""Says, beside a package that has been registered, as what."""


class RecordDelivery:
    """Send metrics, parameters, tags and inputs of a run, many in one request.

    Metrics carry the time at which they were measured. So MLflow knows those that it already has, where an answer was
    lost and they are sent again.

    Args:
        client: of the tracking store.
        run_id: of the run.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def __call__(self, entries: Sequence[Entry]) -> int:
        """Send the first entries and return how many.

        Raises:
            MlflowException: whatever the client raises. Of one entry that is refused alone, all else has arrived.
        """
        if entries[0]["kind"] == "dataset":
            self._client.log_inputs(self._run_id, datasets=[_dataset_input(entries[0])])
            return 1
        if entries[0]["kind"] == "model":
            self._client.log_inputs(self._run_id, models=[LoggedModelInput(entries[0]["model_id"])])
            return 1
        joined = _joined(entries)
        try:
            self._log(joined)
        except MlflowException as error:
            if len(entries) > 1 or not is_refusal(error):
                raise
            self._log_apart(entries[0])
        return len(joined)

    def _log_apart(self, entry: Entry) -> None:
        """Log each item of an entry by itself: one that is refused takes its whole request with it."""
        refusals = []
        for part in _parts(entry):
            try:
                self._log([part])
            except MlflowException as error:
                if not is_refusal(error):
                    raise
                refusals.append(str(error))
        if refusals:
            raise MlflowException("; ".join(refusals), INVALID_PARAMETER_VALUE)

    def _log(self, joined: Sequence[Entry]) -> None:
        metrics = [Metric(*metric) for entry in joined for metric in entry.get("metrics", ())]
        params = {key: value for entry in joined for key, value in entry.get("params", {}).items()}
        tags = {key: value for entry in joined for key, value in entry.get("tags", {}).items()}
        self._client.log_batch(
            self._run_id,
            metrics=metrics,
            params=[Param(*item) for item in params.items()],
            tags=[RunTag(*item) for item in tags.items()],
        )


def _parts(entry: Entry) -> list[Entry]:
    kind, items = entry["kind"], entry[entry["kind"]]
    apart = [[item] for item in items] if kind == "metrics" else [{key: value} for key, value in items.items()]
    return [{"kind": kind, kind: part} for part in apart]


def _joined(entries: Sequence[Entry]) -> list[Entry]:
    """Return the first entries that fit one request: at least one."""
    joined: list[Entry] = []
    sizes = dict.fromkeys(JOINABLE, 0)
    for entry in takewhile(lambda entry: entry["kind"] in JOINABLE, entries):
        kind = entry["kind"]
        sizes[kind] += len(entry[kind])
        full = sizes["metrics"] > MOST_METRICS - MOST_PARAMS - MOST_TAGS
        if joined and (full or sizes["params"] > MOST_PARAMS or sizes["tags"] > MOST_TAGS):
            break
        joined.append(entry)
    return joined


def _dataset_input(entry: Entry) -> DatasetInput:
    return DatasetInput(Dataset(**entry["dataset"]), tags=[InputTag("mlflow.data.context", entry["context"])])


class FileDelivery:
    """Upload files of the output folder, and register the network.

    Args:
        client: of the tracking store.
        run_id: of the run.
        output: the output folder, which the entries' paths are relative to.
    """

    def __init__(self, client: MlflowClient, run_id: str, output: Path) -> None:
        self._client = client
        self._run_id = run_id
        self._output = output

    def __call__(self, entries: Sequence[Entry]) -> int:
        """Send the first entry and return 1."""
        entry = entries[0]
        path = self._output / entry["path"]
        if not path.exists():  # a newer checkpoint has taken its place
            return 1
        if entry["kind"] == "register":
            version = register_package(self._client, self._run_id, path)
            (path / REGISTERED).write_text(json.dumps({"version": version}))
        elif path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), entry["folder"])
        else:
            self._client.log_artifact(self._run_id, str(path), entry["folder"])
        if entry["kind"] == "snapshot":
            shutil.rmtree(path.parent, ignore_errors=True)
        return 1
