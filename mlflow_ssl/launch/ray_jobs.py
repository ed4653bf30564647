"""``mlflow run . --backend ray --backend-config ray.json``: the project as a job of a Ray cluster, to its end."""

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from mlflow.exceptions import ExecutionException
from pydantic import Field

from mlflow_ssl.errors import Interrupted
from mlflow_ssl.launch.project import Backend, Project, Settings, is_local

log = logging.getLogger(__name__)

WORKERS = "MLFLOW_SSL_RAY"
"""Variable that tells a job's driver how many workers it has, and what they get."""
USERS_MISTAKE = 2
"""Exit code of a job that would end in the same way again."""
POLL_SECONDS = 1.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_COLOR_PREFIX": "0"}
"""No word to Ray's makers, none of theirs about GPUs that nobody asked for, and no colours in a log."""
PRIORITY = {"RAY_worker_niceness": "0"}
"""Of the processes of a Ray of this machine's own: it would have everything else go before the training."""


class RaySettings(Settings):
    """What ``ray.json`` may hold.

    Attributes:
        address: of the cluster's job server, such as ``http://head:8265``; None starts a Ray of this machine's own.
        num_workers: processes that share a training.
        cpus_per_worker: cores that each reserves.
        gpus_per_worker: GPUs that each has, 0 or 1.
        resources_per_worker: other resources of the cluster that each reserves.
        max_failures: how often a training goes on after it has lost a worker, or the job its node.
        install: have the cluster install the project's packages; otherwise its nodes have them.
        storage_path: folder that all nodes share, where Ray Train keeps its state.
        environment: further variables of the job.
    """

    address: str | None = None
    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    max_failures: int = Field(default=3, ge=0)
    install: bool = True
    storage_path: str | None = None
    environment: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a job ended: ``SUCCEEDED``, ``FAILED`` or ``STOPPED``, its exit code if it has one, and Ray's own words."""

    status: str
    exit_code: int | None
    message: str


class RayBackend(Backend):
    """Submit a project's entry point to Ray.

    A training is spread over ``num_workers`` processes by Ray Train; other entry points are one process. A lost worker,
    or a lost job, is started again, and goes on in the same run from its last checkpoint.
    """

    name = "ray"
    settings = RaySettings

    def check(self, settings: RaySettings, tracking_uri: str) -> None:
        """Check that Ray is installed, and that a cluster can reach the store."""
        if importlib.util.find_spec("ray") is None:
            raise ExecutionException("--backend ray needs Ray; install it with: pip install 'mlflow_ssl[ray]'")
        if settings.address and is_local(tracking_uri):
            raise ExecutionException(
                f"the tracking store must be one that the cluster {settings.address} can reach, got {tracking_uri}; "
                "start `mlflow server` and set MLFLOW_TRACKING_URI"
            )

    def execute(self, project: Project, settings: RaySettings) -> tuple[str, str]:
        """Run the project's job on the cluster, or on a Ray of this machine's own."""
        with _cluster(settings) as address:
            ended = _run_job(project, settings, address)
        status = {"SUCCEEDED": "FINISHED", "STOPPED": "KILLED"}.get(ended.status, "FAILED")
        return status, f"the Ray job was {ended.status.lower()}: {ended.message}"


@contextlib.contextmanager
def _cluster(settings: RaySettings) -> Iterator[str]:
    """Return the address of the job server: the cluster's, or that of a Ray that lives as long as the context."""
    os.environ.update({key: value for key, value in (QUIET | PRIORITY).items() if key not in os.environ})
    import ray

    if settings.address:
        yield settings.address
        return
    cores = max(settings.num_workers * settings.cpus_per_worker + 1, os.cpu_count() or 1)  # 1 for the job itself
    context = ray.init(num_cpus=int(cores), include_dashboard=True, log_to_driver=False, logging_level=logging.WARNING)
    try:
        url = context.dashboard_url
        if not url:
            raise ExecutionException("Ray's job server did not start; install it with: pip install 'ray[default]'")
        yield f"http://{url}"
    finally:
        ray.shutdown()


def _run_job(project: Project, settings: RaySettings, address: str) -> Ended:
    """Submit the project's job, and again as often as it may be lost; return how the last one ended."""
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ExecutionException(f"the Ray cluster must answer at {address}: {str(error).splitlines()[0]}") from error
    for attempt in range(settings.max_failures + 1):
        job = client.submit_job(
            entrypoint=shlex.join(_words(project, settings)),
            runtime_env=_runtime_env(project, settings),
            submission_id=f"mlflow-ssl-{project.run_id}-{attempt}",
            metadata={"mlflow_run_id": project.run_id},
        )
        log.info("Ray job %s is submitted to %s", job, address)
        ended = _watch(client, job)
        lost = ended.status == "FAILED" and ended.exit_code in (None, -9, 137)
        if not lost or attempt == settings.max_failures:
            return ended
        log.warning("Ray job %s is lost (%s) and is submitted again", job, ended.message)
    raise AssertionError("unreachable")


def _words(project: Project, settings: RaySettings) -> list[str]:
    python = "python" if settings.address else sys.executable
    words = [python if word == "python" else word for word in project.words]
    if project.trains:
        words[2] = "mlflow_ssl.launch.ray_train"
    return words


def _runtime_env(project: Project, settings: RaySettings) -> dict[str, Any]:
    """Return the variables of the job and, on a cluster, its files and packages."""
    variables = project.environment | {WORKERS: settings.model_dump_json()} | QUIET | settings.environment
    if not settings.address:  # this machine has all: the folder is worked in where it lies
        path = os.pathsep.join(filter(None, (str(project.folder), os.environ.get("PYTHONPATH"))))
        return {"env_vars": variables | {"PYTHONPATH": path, "MLFLOW_SSL_FOLDER": str(project.folder)}}
    described: dict[str, Any] = {"env_vars": variables, "working_dir": str(project.folder)}
    if settings.install:
        described["uv"] = _packages(project)
    return described


def _packages(project: Project) -> list[str]:
    """Return what ``conda.yaml`` has pip install."""
    file = project.folder / "conda.yaml"
    listed = yaml.safe_load(file.read_text())["dependencies"] if file.is_file() else []
    return [package for part in listed if isinstance(part, dict) for package in part.get("pip", [])]


def _watch(client: Any, job: str) -> Ended:
    """Show what a job prints until it ends, and stop it when this process is told to stop."""
    try:
        while not client.get_job_status(job).is_terminal():
            with contextlib.suppress(RuntimeError, OSError):  # a lost connection: ask again
                asyncio.run(_print_log(client, job))
            time.sleep(POLL_SECONDS)
    except (Interrupted, KeyboardInterrupt):
        with contextlib.suppress(Exception):
            client.stop_job(job)
        raise
    details = client.get_job_info(job)
    return Ended(str(details.status.value), details.driver_exit_code, str(details.message or "").strip()[-500:])


async def _print_log(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()


def read_workers() -> RaySettings:
    """Return what the backend told a job about its workers."""
    return RaySettings.model_validate(json.loads(os.environ.get(WORKERS, "{}")))
