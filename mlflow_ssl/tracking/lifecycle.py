"""The life of a run: opened or taken over, and always ended, whatever MLflow does meanwhile."""

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_ssl.errors import InputError, Interrupted, MachineError, NotSynced
from mlflow_ssl.processes import is_first_process
from mlflow_ssl.secret import redact
from mlflow_ssl.siblings import Failure
from mlflow_ssl.tracking.history import stored_metrics
from mlflow_ssl.tracking.note import failure_note
from mlflow_ssl.tracking.opening import REASON_TAG, check_answers, connect, open_run, without_password
from mlflow_ssl.tracking.run import FOLDER, Run, RunRecord, lock_output
from mlflow_ssl.tracking.source import git_tags, version_tags
from mlflow_ssl.tracking.system import SystemMetrics
from mlflow_ssl.watch import watch

log = logging.getLogger(__name__)

NOTE_TAG = "mlflow.note.content"
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
STOP_SECONDS = 12.0
"""How long a run that was told to stop goes on sending: the machine may be gone after 30 s."""
HASTE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""How long it waits for one answer then."""
IMPATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""MLflow's client tries for minutes on its own; what is sent here is tried again by its sender."""
QUIET = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""MLflow prints the server's address with the password in it."""


def prepare_store(uri: str | None) -> None:
    """Make sure that the tracking store answers, and create it if it is new; no run is opened.

    Raises:
        InputError: if it does not answer, or refuses.
    """
    if is_first_process():
        connect(uri)


@contextlib.contextmanager
def tracked_run(
    config: Mapping[str, Any],
    *,
    output: Path,
    run_id: str | None = None,
    data_digest: str | None = None,
    name: str | None = None,
) -> Iterator[Run]:
    """Open a run, or go on in one, and end it whatever happens.

    It ends FINISHED, KILLED after Ctrl-C or SIGTERM, or FAILED, the last two with the reason as tag
    ``mlflow_ssl.reason``.

    Args:
        config: resolved config.
        output: the output folder; its ``main.log`` is uploaded at the end.
        run_id: the run to go on in; by default the one that ``mlflow run`` opened, or else a new one.
        data_digest: of the data set that is trained on.
        name: how the name of a new run begins; by default with ``core.tag`` and the backbone.

    Raises:
        InputError: if the tracking store does not answer or refuses, or another process writes to ``output``.
        MachineError: if the disk is full.
        NotSynced: at the end, if not everything has reached MLflow.
    """
    if not is_first_process():
        yield Run(None, RunRecord("", "", ""), output)
        return
    with contextlib.closing(_Lock(output)):
        run = _open(config, output, run_id, data_digest, name)
        system = SystemMetrics(run) if config["tracking"]["system_metrics"] else None
        if system:
            system.start()
        patience = config["tracking"]["wait_at_end_seconds"]
        watch.end_run = functools.partial(_end_for_failure, run, patience=patience)
        status, reason = "FINISHED", ""
        try:
            with _environment(IMPATIENCE):
                yield run
            watch.depart()
        except BaseException as error:
            failure = watch.leave(error)
            status, reason = _ending(error) if failure is None else (failure.status, failure.reason)
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise MachineError(reason) from error
            raise
        finally:
            if system:
                system.stop()
            with _environment(IMPATIENCE | QUIET | (HASTE if status == "KILLED" else {})):
                arrived = _end(run, status, redact(reason), patience=patience)
            if not arrived and status == "FINISHED":
                raise NotSynced(_unsynced_words(run))


def _end_for_failure(run: Run, failure: Failure, *, patience: float) -> None:
    """End a run whose own thread is stuck, from another."""
    with _environment(IMPATIENCE | QUIET | (HASTE if failure.signum else {})):
        _end(run, failure.status, redact(failure.reason), patience=patience)


def _ending(error: BaseException) -> tuple[str, str]:
    """Return status and reason of a run that an error ends."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "KILLED", str(error) or "stopped by Ctrl-C"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "FAILED", f"the disk takes no more: {error}"
    known = isinstance(error, InputError | MachineError)
    return "FAILED", str(error) if known else f"{type(error).__name__}: {error}"


class _Lock:
    def __init__(self, output: Path) -> None:
        self._lock = lock_output(output)

    def close(self) -> None:
        self._lock.release()


def _open(
    config: Mapping[str, Any], output: Path, run_id: str | None, data_digest: str | None, name: str | None
) -> Run:
    client = connect(config["tracking"]["uri"])
    stored = open_run(client, config, run_id=run_id, output=output, name=name)
    record = RunRecord(
        run_id=stored.info.run_id,
        experiment_id=stored.info.experiment_id,
        tracking_uri=without_password(client.tracking_uri),
        data_digest=data_digest,
    )
    record.write(output)
    run = Run(client, record, output, known_params=stored.data.params)
    if run_id and not run.first:  # the output folder is a new one
        run.remember(stored_metrics(client, run_id))
        run.remember_pictures(Path(info.path).name for info in client.list_artifacts(run_id, "images"))
    run.set_tags(git_tags() | version_tags())
    return run


def _end(run: Run, status: str, reason: str, *, patience: float) -> bool:
    """End a run, and return whether all of it is in MLflow."""
    deadline = time.monotonic() + STOP_SECONDS if status == "KILLED" else float("inf")
    run.record = dataclasses.replace(run.record, status=status, end_time=int(time.time() * 1000))
    try:
        if reason:
            log.error("%s: %s", status, reason)
            run.set_tags({REASON_TAG: reason, NOTE_TAG: run.failure_note(status, reason)})
            run.log_checkpoints()
        run.log_file(run.output / "main.log")
        run.record.write(run.output)
    except OSError as error:  # a full disk: what can be said is said without it
        log.warning("the end of the run cannot be written to %s: %s", run.output, error)
        with contextlib.suppress(MlflowException):
            mlflow.set_tags({REASON_TAG: reason[:1000]})
    arrived = run.drain(patience=patience, deadline=deadline)
    run.close()
    last_patience = min(patience, deadline - time.monotonic()) if arrived else 0
    arrived = _say_ended(run.record, status, patience=last_patience) and arrived
    if not arrived and status != "FINISHED":
        log.error("%s", _unsynced_words(run))
    return arrived


def _say_ended(record: RunRecord, status: str, *, patience: float) -> bool:
    """Tell MLflow that a run has ended, and return whether it listened."""
    give_up = time.monotonic() + patience
    try:
        if mlflow.active_run() is None:  # in another thread than the run's
            MlflowClient().set_terminated(record.run_id, status, record.end_time)
        mlflow.end_run(status)  # forgets the run before it asks the server
    except Exception as error:
        log.debug("the run's end did not reach MLflow: %s", error)
        while time.monotonic() < give_up:
            time.sleep(0.5)
            with contextlib.suppress(Exception):
                MlflowClient().set_terminated(record.run_id, status, record.end_time)
                return True
        return False
    return True


def _unsynced_words(run: Run) -> str:
    return (
        f"not everything is in MLflow yet ({run.trouble or 'it does not answer'}); nothing is lost: when it is back, "
        f"send the rest with\n  python -m mlflow_ssl sync {run.output}"
    )


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that the user has not set, for a while."""
    new = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            os.environ.pop(key, None)


def sync(
    output: Path, *, status: str = "KILLED", reason: str = "the process ended without a word", patience: float = 30
) -> None:
    """Send what an output folder holds and MLflow lacks, and end its run; any number of times.

    Args:
        output: the output folder.
        status: of a run whose process could not say how it ended.
        reason: of that.
        patience: seconds without any success after which it is given up.

    Raises:
        InputError: if the folder is no run's, or is being written to.
        NotSynced: if MLflow still cannot be reached.
    """
    record = RunRecord.read(output)
    with contextlib.closing(_Lock(output)), _environment(IMPATIENCE):
        mine = mlflow.get_tracking_uri()
        # an address of the environment may carry the password that the record does not
        uri = mine if without_password(mine) == record.tracking_uri else record.tracking_uri
        try:
            client = connect(uri)
        except InputError as error:
            raise NotSynced(str(error)) from error
        run = Run(client, record, output)
        try:
            if not run.drain(patience=patience):
                raise NotSynced(_unsynced_words(run))
            _end_stored(client, record, output, status=status, reason=reason)
        finally:
            run.close()
    for reason in run.refused:
        log.warning("refused, and kept in %s: %s", output, reason)


def _end_stored(client: MlflowClient, record: RunRecord, output: Path, *, status: str, reason: str) -> None:
    if record.status is None:  # its process was killed before it could say anything
        record = dataclasses.replace(record, status=status, end_time=int(time.time() * 1000))
        resumable = (output / "checkpoints" / "last.ckpt").exists()
        note = failure_note(record.run_id, status=status, reason=reason, output=output, resumable=resumable)
        for key, value in {REASON_TAG: reason, NOTE_TAG: note}.items():
            client.set_tag(record.run_id, key, value)
        record.write(output)
    client.set_terminated(record.run_id, record.status, record.end_time)


def end_lost_run(output: Path, failure: Failure) -> None:
    """End the run of a first process that is gone, in the place of it, if nobody else is at it."""
    if not (output / FOLDER / "run.json").exists():
        end_unopened_run(failure)
        return
    try:
        if RunRecord.read(output).status is not None:  # it has ended in good order
            return
        sync(output, status=failure.status, reason=redact(failure.reason), patience=STOP_SECONDS)
    except (InputError, NotSynced) as error:
        log.debug("the run could not be ended: %s", error)
    else:
        sys.stderr.write(f"error: {failure.reason}\n")  # nobody else will


def end_unopened_run(failure: Failure) -> None:
    """End the run that ``mlflow run`` opened, where there is one that was not taken over."""
    if "MLFLOW_RUN_ID" in os.environ:
        end_launched_run(os.environ.pop("MLFLOW_RUN_ID"), status=failure.status, reason=failure.reason)


def end_launched_run(run_id: str, *, status: str, reason: str) -> None:
    """End a run that ``mlflow run`` opened and that we never took over, if there is anyone to tell."""
    try:
        check_answers(mlflow.get_tracking_uri())
    except InputError:  # MLflow's client would go on trying for minutes
        return
    client = MlflowClient()
    if client.get_run(run_id).info.status == "FINISHED":  # it was started again at its end, and refused
        return
    client.set_tag(run_id, REASON_TAG, redact(reason)[:1000])
    client.set_terminated(run_id, status)
