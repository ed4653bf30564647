"""A run: what a training says goes to its output folder first, and from there to MLflow in the background."""

import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from pytorch_lightning.utilities import rank_zero_only

from mlflow_ssl.errors import InputError
from mlflow_ssl.secret import redact, redacted
from mlflow_ssl.tracking.delivery import REGISTERED, FileDelivery, RecordDelivery
from mlflow_ssl.tracking.journal import Entry, Journal
from mlflow_ssl.tracking.note import failure_note
from mlflow_ssl.tracking.params import loggable_params
from mlflow_ssl.tracking.sender import Sender

if TYPE_CHECKING:
    from mlflow.data.dataset import Dataset
    from PIL import Image

log = logging.getLogger(__name__)

FOLDER = "tracking"
"""Where an output folder keeps what goes to MLflow."""
LONGEST_TAG = 8000


@dataclass(frozen=True)
class RunRecord:
    """Which run an output folder belongs to, and how it ended; ``run.json`` in the folder."""

    run_id: str
    experiment_id: str
    tracking_uri: str
    status: str | None = None
    end_time: int | None = None
    data_digest: str | None = None

    def write(self, output: Path) -> None:
        """Write the record, whole or not at all."""
        file = output / FOLDER / "run.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".part")
        scratch.write_text(json.dumps(asdict(self), indent=2) + "\n")
        scratch.replace(file)

    @classmethod
    def read(cls, output: Path) -> "RunRecord":
        """Read the record of an output folder.

        Raises:
            InputError: if there is none.
        """
        file = output / FOLDER / "run.json"
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{output} is not the output folder of a run: {file} cannot be read") from error


def lock_output(output: Path) -> FileLock:
    """Return the lock of an output folder, taken: one process at a time writes there.

    Raises:
        InputError: if another process has it.
    """
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / FOLDER / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is writing to {output}: its run goes on; wait for it, or stop it") from error
    return lock


@dataclass
class Run:
    """An open run.

    In a distributed training only the first process talks to MLflow; the others' runs say nothing.

    Args:
        client: of the tracking store; None in the other processes.
        record: which run it is.
        output: the output folder.

        known_params: parameters that the run has, from the launcher or from before it was resumed.

    Attributes:
        first: the first value of each metric.
        step: says how many optimizer steps are done.
        describe: what the run's page says of a status and its reason; None for what it says of a training.
    """

    client: MlflowClient | None
    record: RunRecord
    output: Path
    known_params: Mapping[str, str] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    step: Callable[[], int] = field(default=int)
    describe: Callable[[str, str], str] | None = None

    def __post_init__(self) -> None:
        """Open the journals, and remember the metrics that are in them."""
        self._last_step: dict[str, int] = {}
        self._uploaded: dict[str, int] = {}
        self._pictured: set[str] = set()
        if self.client is None:
            return
        records, files = (Journal(self.output / FOLDER, name) for name in ("records", "files"))
        self.remember(entry for entry in records if entry["kind"] == "metrics")
        self.remember_pictures(Path(entry["path"]).name for entry in files)
        self._records = Sender(records, RecordDelivery(self.client, self.run_id))
        self._files = Sender(files, FileDelivery(self.client, self.run_id, self.output))
        for sender in (self._records, self._files):
            sender.start()

    @property
    def run_id(self) -> str:
        """The run's id in MLflow."""
        return self.record.run_id

    def failure_note(self, status: str, reason: str) -> str:
        """Return what the run's page says when it has failed or was stopped."""
        if self.describe is not None:
            return self.describe(status, reason)
        resumable = (self.output / "checkpoints" / "last.ckpt").exists()
        return failure_note(self.run_id, status=status, reason=reason, output=self.output, resumable=resumable)

    def remember(self, entries: Iterable[Entry]) -> None:
        """Take note of metrics that were logged before: a step is never logged again."""
        for entry in entries:
            for key, value, _, step in entry["metrics"]:
                self.first.setdefault(key, value)
                self._last_step[key] = max(step, self._last_step.get(key, -1))

    def remember_pictures(self, names: Iterable[str]) -> None:
        """Take note of pictures that were logged before, by the names of their files."""
        self._pictured |= {name.partition("+timestamp+")[0] for name in names if "+step+" in name}

    @rank_zero_only
    def log_params(self, config: Mapping[str, Any]) -> None:
        """Log every leaf of a resolved config under its dotted key, but for those that the run has already."""
        params = list(loggable_params(redacted(config), known=self.known_params).items())
        for start in range(0, len(params), 100):
            self._say({"kind": "params", "params": dict(params[start : start + 100])})

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._say({"kind": "tags", "tags": {key: redact(value)[:LONGEST_TAG] for key, value in tags.items()}})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics, each at most once a step: what a resumed training does again is not said again."""
        now = int(time.time() * 1000)
        new = [(key, float(value), now, step) for key, value in metrics.items() if step > self._last_step.get(key, -1)]
        if new:
            entry = {"kind": "metrics", "metrics": new}
            self._say(entry)
            self.remember([entry])

    @rank_zero_only
    def log_dataset(self, dataset: "Dataset", *, context: str) -> None:
        """Log a data set as an input of the run."""
        self._say({"kind": "dataset", "dataset": dataset._to_mlflow_entity().to_dictionary(), "context": context})

    @rank_zero_only
    def log_model_input(self, model_id: str) -> None:
        """Log a logged model as an input of the run: it is what the training starts from."""
        self._say({"kind": "model", "model_id": model_id})

    @rank_zero_only
    def log_file(self, file: Path, folder: str | None = None, *, kind: str = "file") -> None:
        """Upload a file or folder of the output folder."""
        self._files.journal.append({"kind": kind, "path": str(file.relative_to(self.output)), "folder": folder})

    @property
    def picture_folder(self) -> Path:
        """Where pictures are kept."""
        return self.output / "images"

    @rank_zero_only
    def log_picture(self, image: "Image.Image", *, key: str, step: int) -> None:
        """Log a picture that the UI shows over steps.

        Args:
            image: the picture.
            key: name; what stands before ``/`` is its section.
            step: optimizer steps done.
        """
        # MLflow's own names, which its UI finds pictures by; written here so that a second upload is the same file
        what = f"{key.replace('/', '~')}+step+{step}"
        if what in self._pictured:  # by the training that this one resumes
            return
        self._pictured.add(what)
        self.picture_folder.mkdir(exist_ok=True)
        name = f"{what}+timestamp+{int(time.time() * 1000)}+{secrets.token_hex(16)}"
        whole, small = (self.picture_folder / f"{name}{end}" for end in (".png", "+compressed.webp"))
        image.save(whole)
        preview = image.copy()
        preview.thumbnail((1024, 1024))
        preview.save(small, quality=80)
        self.log_file(whole, "images")
        self.log_file(small, "images")
        self.set_tags({"mlflow.loggedImages": "true"})

    @rank_zero_only
    def log_text(self, text: str, artifact_file: str) -> None:
        """Log a text as an artifact, such as ``pictures/projection.html``."""
        file = self.output / artifact_file
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(file.name + ".part")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(file)
        self.log_file(file, os.path.dirname(artifact_file) or None)  # noqa: PTH120 artifacts have POSIX paths

    @rank_zero_only
    def log_checkpoints(self) -> None:
        """Upload the checkpoints as they are now; the one to resume from comes last, when all else is there."""
        files = (self.output / "checkpoints").glob("*.ckpt")
        for file in sorted(files, key=lambda file: (file.name == "last.ckpt", file.name)):
            changed = file.stat().st_mtime_ns
            if self._uploaded.get(file.name) != changed:
                self._uploaded[file.name] = changed
                self._log_snapshot(file, "checkpoints")

    def _log_snapshot(self, file: Path, folder: str) -> None:
        """Upload a file as it is now, though it will be replaced; a later snapshot takes an earlier one's place."""
        outbox = self.output / FOLDER / "outbox"
        superseded = [found.parent for found in outbox.glob(f"*/{file.name}")]
        snapshot = outbox / secrets.token_hex(8) / file.name
        snapshot.parent.mkdir(parents=True)
        try:
            os.link(file, snapshot)
        except OSError:  # not every file system has links
            shutil.copyfile(file, snapshot)
        self.log_file(snapshot, folder, kind="snapshot")
        for old in superseded:
            shutil.rmtree(old, ignore_errors=True)

    def registered_version(self, package: Path, *, patience: float) -> str | None:
        """Register a packaged network and return its version; None if MLflow cannot be reached."""
        self.log_file(package, kind="register")
        self._files.drain(patience=patience)
        file = package / REGISTERED
        return json.loads(file.read_text())["version"] if file.exists() else None

    @rank_zero_only
    def sync(self) -> None:
        """Have the disk hold everything that was said so far."""
        for sender in (self._records, self._files):
            sender.journal.sync()

    def drain(self, *, patience: float, deadline: float = float("inf")) -> bool:
        """Send all that is left and return whether it has arrived; see `Sender.drain`."""
        files = self._files.drain(patience=patience, deadline=deadline)
        records = self._records.drain(patience=patience, deadline=deadline)  # tried though files fail
        return files and records

    @property
    def refused(self) -> list[str]:
        """What MLflow refused, by its reasons."""
        return self._files.refused + self._records.refused

    @property
    def trouble(self) -> str:
        """Why MLflow cannot be reached; empty while it can."""
        return self._files.trouble or self._records.trouble

    def close(self) -> None:
        """Stop sending."""
        for sender in (self._records, self._files):
            sender.stop()
            if not sender.is_alive():
                sender.journal.close()

    def _say(self, entry: Entry) -> None:
        self._records.journal.append(entry)
