"""What all backends do: the project and its run made ready, its command executed somewhere else, its end seen to."""

import contextlib
import os
import shlex
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mlflow import MlflowClient, set_tracking_uri
from mlflow.entities import RunStatus
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun
from mlflow.projects.utils import (
    fetch_and_validate_project,
    get_entry_point_command,
    get_or_create_run,
    get_run_env_vars,
    load_project,
)
from pydantic import BaseModel, ConfigDict, ValidationError

from mlflow_ssl.errors import Interrupted
from mlflow_ssl.signals import stop_signals
from mlflow_ssl.tracking.opening import REASON_TAG

MODULE = "mlflow_ssl"
"""What the project's commands run, behind ``python -m``."""
LAUNCHERS_OWN = {"build_image", "docker_auth"}
"""Keys that MLflow adds to a backend's config, besides those in capitals."""
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Variables that a process elsewhere needs to reach the same server."""

SettingsT = TypeVar("SettingsT", bound="Settings")


class Settings(BaseModel):
    """What ``--backend-config`` may hold."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def read(cls: type[SettingsT], given: Mapping[str, Any]) -> SettingsT:
        """Return the settings of a backend's config.

        Raises:
            ExecutionException: naming the first key that is wrong.
        """
        own = {key: value for key, value in given.items() if not key.isupper() and key not in LAUNCHERS_OWN}
        try:
            return cls.model_validate(own)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ExecutionException(
                f"backend config: {key} is wrong: {first['msg']}, got {first['input']!r}; it may hold "
                f"{', '.join(sorted(cls.model_fields))}"
            ) from error


@dataclass(frozen=True)
class Project:
    """A project whose run is open.

    Attributes:
        folder: where it lies, absolute.
        run_id: its run.
        words: the command of its entry point.
        environment: variables that make a process log to the run.
    """

    folder: Path
    run_id: str
    words: tuple[str, ...]
    environment: dict[str, str]

    @property
    def trains(self) -> bool:
        """Whether the command is a training, which can be spread over processes and gone on with."""
        return self.words[:3] == ("python", "-m", MODULE) and (len(self.words) < 4 or self.words[3].startswith("-"))


def open_project(
    project_uri: str,
    entry_point: str,
    params: Mapping[str, str],
    version: str | None,
    *,
    tracking_uri: str,
    experiment_id: str,
    backend: str,
) -> Project:
    """Fetch a project, and open the run that its command will take over.

    Args:
        project_uri: a folder or a Git repository.
        entry_point: of its MLproject.
        params: of the entry point.
        version: commit or branch of a Git repository.
        tracking_uri: of the store that the run is in.
        experiment_id: where the run goes.
        backend: its name, for the run's tag.

    Raises:
        ExecutionException: if there is no such project or entry point.
    """
    fetched = fetch_and_validate_project(project_uri, version, entry_point, params)  # type: ignore[no-untyped-call]
    folder = Path(fetched).resolve()
    project = load_project(folder)  # type: ignore[no-untyped-call]
    set_tracking_uri(absolute(tracking_uri))
    made = get_or_create_run(None, project_uri, experiment_id, folder, version, entry_point, params)  # type: ignore[no-untyped-call]
    run_id = made.info.run_id
    MlflowClient().set_tag(run_id, "mlflow.project.backend", backend)
    with _ended_on_error(run_id):
        (command,) = get_entry_point_command(project, entry_point, params, None)  # type: ignore[no-untyped-call]
        environment = get_run_env_vars(run_id, experiment_id)  # type: ignore[no-untyped-call]
        environment |= {name: os.environ[name] for name in CREDENTIALS if name in os.environ}
        return Project(folder, run_id, tuple(shlex.split(command)), environment)


def absolute(tracking_uri: str) -> str:
    """Return the address of a store as a process in another folder understands it.

    Example:
        >>> absolute("http://tracking:5000"), absolute("sqlite:////data/mlflow.db")
        ('http://tracking:5000', 'sqlite:////data/mlflow.db')
    """
    scheme, colon, path = tracking_uri.partition(":///")
    relative = colon and scheme.startswith("sqlite") and not path.startswith("/")
    return f"{scheme}:///{Path(path).resolve()}" if relative else tracking_uri


def is_local(tracking_uri: str) -> bool:
    """Return whether a store is one that only this machine, or its file system, can reach."""
    return tracking_uri.startswith(("sqlite:", "file:", "/", "."))


@contextlib.contextmanager
def _ended_on_error(run_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        end(run_id, "FAILED", str(error))
        raise


@contextlib.contextmanager
def watched(project: Project) -> Iterator[None]:
    """End the project's run KILLED when this process is told to stop, and FAILED at any other error."""
    try:
        with stop_signals.raised():
            yield
    except Interrupted as error:
        end(project.run_id, "KILLED", str(error))
        raise
    except Exception as error:
        end(project.run_id, "FAILED", str(error))
        raise


def end(run_id: str, status: str, reason: str = "") -> str:
    """End a run that its own process has not ended, and return how it stands then.

    A process that was killed with its machine says nothing more; one that could still speak has said it better.
    """
    client = MlflowClient()
    stands: str = client.get_run(run_id).info.status
    if RunStatus.is_terminated(RunStatus.from_string(stands)):
        return stands
    if reason:
        client.set_tag(run_id, REASON_TAG, reason[:1000])
    client.set_terminated(run_id, status)
    return status


class EndedRun(SubmittedRun):
    """A run that has ended: the backends watch theirs to its end, since the launcher does not."""

    def __init__(self, run_id: str, status: str) -> None:
        super().__init__()
        self._run_id = run_id
        self._status = status

    @property
    def run_id(self) -> str:
        """Its id."""
        return self._run_id

    def wait(self) -> bool:
        """Return whether it ended well."""
        return self._status == "FINISHED"

    def get_status(self) -> str:
        """Return its status."""
        return self._status

    def cancel(self) -> None:
        """Do nothing: there is nothing to cancel any more."""


def closed(project: Project, status: str, reason: str = "") -> EndedRun:
    """Return the run at its end.

    Raises:
        ExecutionException: if it did not end well, so that ``mlflow run`` fails too.
    """
    stands = end(project.run_id, status, reason)
    if stands != "FINISHED":
        said = MlflowClient().get_run(project.run_id).data.tags.get(REASON_TAG, reason)
        raise ExecutionException(f"run {project.run_id} ended {stands}: {said}")
    return EndedRun(project.run_id, stands)


class Backend(AbstractBackend):
    """A place where a project's entry point is executed, and watched to its end, since the launcher does not wait.

    Attributes:
        name: what ``--backend`` calls it.
        settings: what its config may hold.
    """

    name: ClassVar[str]
    settings: ClassVar[type[Settings]]

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, str],
        version: str | None,
        backend_config: Mapping[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> EndedRun:
        """Run the entry point, and return when it has ended.

        Raises:
            ExecutionException: for a mistake in the config, or if the run does not end well.
            SystemExit: if this process is told to stop.
        """
        settings = self.settings.read(backend_config)
        self.check(settings, tracking_uri)
        project = open_project(
            project_uri,
            entry_point,
            params,
            version,
            tracking_uri=tracking_uri,
            experiment_id=experiment_id,
            backend=self.name,
        )
        try:
            with watched(project):
                status, reason = self.execute(project, settings)
        except Interrupted as error:  # which `mlflow run` would show as a traceback
            sys.stderr.write(f"run {project.run_id} ended KILLED: {error}\n")
            raise SystemExit(error.exit_code) from error
        return closed(project, status, reason)

    @abstractmethod
    def check(self, settings: Any, tracking_uri: str) -> None:
        """Check, before a run is opened, that the place is there and can reach the tracking store.

        Raises:
            ExecutionException: if it is not.
        """

    @abstractmethod
    def execute(self, project: Project, settings: Any) -> tuple[str, str]:
        """Execute the project's command, show what it prints, and return the run's status and the reason for it."""
