"""``mlflow run . --backend slurm --backend-config slurm.json``: the project as a Slurm job, watched to its end.

submitit writes the batch script, starts one process a task, and queues a job again that Slurm has stopped for its time
or for another's. The project's Python is the one that submits, which the nodes must see, as they must the project's
folder.
"""

import contextlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mlflow.exceptions import ExecutionException
from pydantic import Field

from mlflow_ssl.errors import Interrupted
from mlflow_ssl.launch.project import Backend, Project, Settings, is_local

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
TASK_POLL_SECONDS = 0.1
STOP_SECONDS = 60
"""How long a training that is told to stop may take to save."""
SPREAD = ("trainer.strategy=ddp",)


class SlurmSettings(Settings):
    """What ``slurm.json`` may hold.

    Attributes:
        cluster: ``slurm``, or ``local`` for processes of this machine, which behave alike.
        folder: for submitit's scripts and logs; all nodes must see it.
        nodes: machines.
        tasks_per_node: processes on each, one a GPU.
        cpus_per_task: cores of each process.
        gpus_per_node: GPUs of each machine.
        mem_gb: memory of each machine; None takes the cluster's default.
        timeout_min: minutes after which Slurm stops the job, and it goes on in the queue.
        signal_seconds: how long before that the training is told to save.
        max_requeues: how often it may go on.
        partition: of the cluster; None takes its default.
        setup: shell commands before the job, such as ``module load cuda``.
        parameters: any others of sbatch, such as ``{"account": "vision"}``.
    """

    cluster: Literal["slurm", "local"] = "slurm"
    folder: str = "outputs/slurm"
    nodes: int = Field(default=1, ge=1)
    tasks_per_node: int = Field(default=1, ge=1)
    cpus_per_task: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    mem_gb: float | None = Field(default=None, gt=0)
    timeout_min: float = Field(default=60, gt=0)
    signal_seconds: int = Field(default=90, ge=1)
    max_requeues: int = Field(default=20, ge=0)
    partition: str | None = None
    setup: list[str] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)


@dataclass
class Job:
    """What each task of the job does; submitit pickles it, and calls `checkpoint` when Slurm is about to stop the job.

    Attributes:
        words: the command.
        folder: where it is run.
        environment: its variables.
        resume: the word that makes it go on, where it can.
    """

    words: tuple[str, ...]
    folder: str
    environment: dict[str, str]
    resume: str | None = None
    _process: Any = field(default=None, init=False, repr=False)

    def __call__(self) -> int:
        """Run the command, and return its exit code."""
        self._process = subprocess.Popen(
            self.words, cwd=self.folder, env=os.environ | self.environment, stderr=subprocess.STDOUT
        )
        try:
            while self._process.poll() is None:  # `wait` would keep `checkpoint`, which a signal calls, from waiting
                time.sleep(TASK_POLL_SECONDS)
            return int(self._process.returncode)
        except BaseException:  # the job is cancelled, or goes back into the queue
            _stop(self._process)
            raise

    def checkpoint(self) -> Any:
        """Have the training save and leave, and return what goes on in its place."""
        from submitit.helpers import DelayedSubmission

        _stop(self._process)
        if self.resume is None:
            return DelayedSubmission(replace(self))
        return DelayedSubmission(replace(self, words=(*self.words, self.resume), resume=None))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the process out."""
        return self.__dict__ | {"_process": None}


def _stop(process: "subprocess.Popen[bytes] | None") -> None:
    if process is None or process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


class SlurmBackend(Backend):
    """Submit a project's entry point to Slurm.

    A training is spread over the job's tasks. When its time is over it saves, the job goes back into the queue, and the
    same run goes on.
    """

    name = "slurm"
    settings = SlurmSettings

    def check(self, settings: SlurmSettings, tracking_uri: str) -> None:
        """Check that submitit is installed, and that the nodes can reach the store."""
        if importlib.util.find_spec("submitit") is None:
            raise ExecutionException(
                "--backend slurm needs submitit; install it with: pip install 'mlflow_ssl[submitit]'"
            )
        if settings.cluster == "slurm" and is_local(tracking_uri):
            raise ExecutionException(
                f"the tracking store must be one that the nodes can reach, got {tracking_uri}; start `mlflow server` "
                "and set MLFLOW_TRACKING_URI"
            )

    def execute(self, project: Project, settings: SlurmSettings) -> tuple[str, str]:
        """Run the project's job."""
        return _watch(_submit(project, settings))


def _submit(project: Project, settings: SlurmSettings) -> Any:
    import submitit

    folder = Path(settings.folder).expanduser().resolve() / project.run_id
    try:
        executor = _executor(folder, settings)
        job = executor.submit(_job(project, settings))
    except RuntimeError as error:  # no sbatch here
        raise ExecutionException(f"Slurm does not take the job: {str(error).splitlines()[0]}") from error
    except submitit.core.utils.FailedJobError as error:
        raise ExecutionException(f"Slurm refuses the job: {str(error).splitlines()[-1]}") from error
    log.info("job %s is submitted; its log is %s", job.job_id, job.paths.stdout)
    return job


def _executor(folder: Path, settings: SlurmSettings) -> Any:
    import submitit

    common = {
        "setup": settings.setup,
        "gpus_per_node": settings.gpus_per_node,
        "signal_delay_s": settings.signal_seconds,
    }
    executor: Any
    if settings.cluster == "local":
        executor = submitit.LocalExecutor(folder, max_num_timeout=settings.max_requeues)
        executor.update_parameters(
            **common, timeout_min=settings.timeout_min, tasks_per_node=settings.nodes * settings.tasks_per_node
        )
        return executor
    executor = submitit.SlurmExecutor(folder, max_num_timeout=settings.max_requeues)
    optional = {
        "mem": f"{settings.mem_gb:g}GB" if settings.mem_gb is not None else None,
        "partition": settings.partition,
    }
    executor.update_parameters(
        **common,
        **{key: value for key, value in optional.items() if value is not None},
        time=max(round(settings.timeout_min), 1),
        nodes=settings.nodes,
        ntasks_per_node=settings.tasks_per_node,
        cpus_per_task=settings.cpus_per_task,
        additional_parameters=settings.parameters,
    )
    return executor


def _job(project: Project, settings: SlurmSettings) -> Job:
    words = [sys.executable if word == "python" else word for word in project.words]
    if project.trains and settings.nodes * settings.tasks_per_node > 1:
        words += [f"trainer.devices={settings.tasks_per_node}", f"trainer.num_nodes={settings.nodes}", *SPREAD]
    resume = f"resume={project.run_id}" if project.trains else None
    path = os.pathsep.join(filter(None, (str(project.folder), os.environ.get("PYTHONPATH"))))
    return Job(
        tuple(words), str(project.folder), project.environment | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, resume
    )


def _watch(job: Any) -> tuple[str, str]:
    """Show what the first task prints until the job ends, and return how: a run's status, and the reason."""
    try:
        for lines in _new_lines(job):
            sys.stdout.write(lines)
            sys.stdout.flush()
    except (Interrupted, KeyboardInterrupt):
        job.cancel()
        raise
    return _ending(job)


def _new_lines(job: Any) -> Iterator[str]:
    """Yield what a job's log has got since the last look, until the job has ended."""
    seen = 0
    while True:
        done = job.done()
        with contextlib.suppress(OSError), job.paths.stdout.open("rb") as file:
            file.seek(seen)
            new = file.read()
            seen += len(new)
            yield new.decode(errors="replace")
        if done:
            return
        time.sleep(POLL_SECONDS)


def _ending(job: Any) -> tuple[str, str]:
    state = str(job.state)
    try:
        codes = job.results()
    except Exception as error:  # submitit's words for whatever became of it
        status = "KILLED" if state.startswith(("CANCELLED", "INTERRUPTED")) else "FAILED"
        return status, f"job {job.job_id} is {state}: {str(error).strip().splitlines()[-1]}"
    worst = max(codes, key=abs)
    if worst == 0:
        return "FINISHED", ""
    killed = worst in (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)
    return (
        "KILLED" if killed else "FAILED",
        f"job {job.job_id} ended with exit code {worst}; its log is {job.paths.stdout}",
    )
