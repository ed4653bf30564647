"""``mlflow run . --backend slurm --backend-config slurm.json``: the project as a Slurm job, watched to its end.

submitit writes the batch script, starts one process a task, and queues a job again that Slurm has stopped for its time
or for another's. The project's Python is the one that submits, which the nodes must see, as they must the project's
folder.
"""

import contextlib
import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mlflow.exceptions import ExecutionException
from pydantic import Field

from mlflow_ssl.errors import Interrupted
from mlflow_ssl.launch.project import Backend, Project, Settings, is_local

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
ASK_SECONDS = 10.0
"""Between two questions to Slurm how a job is: its controller answers everybody."""
TASK_POLL_SECONDS = 0.1
STOP_SECONDS = 60
"""How long a training that is told to stop may take to save."""
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a training that was told to stop."""
OVER = {
    "COMPLETED": "FINISHED",
    "CANCELLED": "KILLED",
    "PREEMPTED": "KILLED",
    "FAILED": "FAILED",
    "TIMEOUT": "FAILED",
    "DEADLINE": "FAILED",
    "OUT_OF_MEMORY": "FAILED",
    "NODE_FAIL": "FAILED",
    "BOOT_FAIL": "FAILED",
    "REVOKED": "FAILED",
    "FORGOTTEN": "FAILED",
}
"""States of a job that Slurm will not start again, and what a run is then that has not said better itself.

``FORGOTTEN`` is our word for a job that Slurm knows no more.
"""


class SlurmSettings(Settings):
    """What ``slurm.json`` may hold.

    Attributes:
        cluster: ``slurm``, or ``local`` for processes of this machine, which behave alike.
        folder: for submitit's scripts and logs; all nodes must see it.
        nodes: machines.
        tasks_per_node: processes on each; by default one a GPU.
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
    tasks_per_node: int | None = Field(default=None, ge=1)
    cpus_per_task: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    mem_gb: float | None = Field(default=None, gt=0)
    timeout_min: float = Field(default=60, gt=0)
    signal_seconds: int = Field(default=90, ge=1)
    max_requeues: int = Field(default=20, ge=0)
    partition: str | None = None
    setup: list[str] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """Processes on each machine."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)


@dataclass
class Job:
    """What each task of the job does; submitit pickles it, and calls `checkpoint` when Slurm is about to stop the job.

    A training that is started again finds that its run is begun, and goes on in it.

    Attributes:
        words: the command.
        folder: where it is run.
        environment: its variables.
    """

    words: tuple[str, ...]
    folder: str
    environment: dict[str, str]
    _process: Any = field(default=None, init=False, repr=False)

    def __call__(self) -> int:
        """Run the command, and return its exit code."""
        self._process = subprocess.Popen(
            self.words,
            cwd=self.folder,
            env=os.environ | self.environment,
            stderr=subprocess.STDOUT,
            # Slurm tells all processes that their time is nearly over, which would kill a training before it can save
            preexec_fn=partial(signal.signal, _preemption_signal(), signal.SIG_IGN),
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
        return DelayedSubmission(replace(self))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the process out."""
        return self.__dict__ | {"_process": None}


def _preemption_signal() -> signal.Signals:
    from submitit.core.job_environment import JobEnvironment

    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]


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
        job = _submit(project, settings)
        return _watch(job, _local_state if settings.cluster == "local" else slurm_state)


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
            **common, timeout_min=settings.timeout_min, tasks_per_node=settings.nodes * settings.tasks
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
        ntasks_per_node=settings.tasks,
        cpus_per_task=settings.cpus_per_task,
        srun_args=[f"--cpus-per-task={settings.cpus_per_task}"],  # srun has not taken it from sbatch since 22.05
        additional_parameters={"requeue": True} | settings.parameters,  # also where that is not the cluster's default
    )
    return executor


def _job(project: Project, settings: SlurmSettings) -> Job:
    words = [sys.executable if word == "python" else word for word in project.words]
    if project.trains and settings.nodes * settings.tasks > 1:
        words += [f"trainer.devices={settings.tasks}", f"trainer.num_nodes={settings.nodes}"]
    path = os.pathsep.join(filter(None, (str(project.folder), os.environ.get("PYTHONPATH"))))
    return Job(tuple(words), str(project.folder), project.environment | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"})


def _watch(job: Any, state_of: Callable[[Any], str]) -> tuple[str, str]:
    """Show what the first task prints until the job ends, and return how: a run's status, and the reason."""
    try:
        for lines in _new_lines(job, ended := _End(job, state_of)):
            sys.stdout.write(lines)
            sys.stdout.flush()
    except (Interrupted, KeyboardInterrupt):
        job.cancel()
        raise
    return _ending(job, ended.state)


class _End:
    """Whether a job has ended: Slurm says so, and is asked now and then, and at once when the first task has an end.

    A task's end is not the job's: one that was stopped for another's job ends, and is started again.

    Args:
        job: submitit's.
        state_of: returns a job's state.

    Attributes:
        state: how it was when it was last asked for.
    """

    def __init__(self, job: Any, state_of: Callable[[Any], str]) -> None:
        self.state = "PENDING"
        self._job = job
        self._state_of = state_of
        self._asked = time.monotonic()
        self._result: int | None = None

    def come(self) -> bool:
        """Return whether the job has ended."""
        result = _written(self._job.paths.result_pickle)
        if result == self._result and time.monotonic() - self._asked < ASK_SECONDS:
            return False
        self.state = self._state_of(self._job)
        self._asked = time.monotonic()
        if self.state not in ("RUNNING", "COMPLETING"):  # until then the job's own end may be near
            self._result = result
        return self.state in OVER


def _written(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def slurm_state(job: Any) -> str:
    """Return the state of a job, in Slurm's words; ``UNKNOWN`` where Slurm does not answer.

    Its controller is asked, and not the accounting, which many clusters do without; but that still knows a job which
    the controller has forgotten, some minutes after the end.
    """
    shown = _said(["scontrol", "show", "job", "--oneliner", job.job_id])
    if found := re.search(r"\bJobState=([A-Z_]+)", shown):
        return found[1]
    if "Invalid job id" not in shown:
        return "UNKNOWN"
    shown = _said(["sacct", "--allocations", "--noheader", "--parsable2", "--format=State", "--jobs", job.job_id])
    found = re.match(r"[A-Z_]+\b", shown)
    return found[0] if found else "FORGOTTEN"


def _said(command: list[str]) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout or ran.stderr


def _local_state(job: Any) -> str:
    """Return the state of a job of this machine's processes, in Slurm's words."""
    if not job.done():
        return "RUNNING"
    return "CANCELLED" if str(job.state) == "INTERRUPTED" else "COMPLETED"


def _new_lines(job: Any, ended: _End) -> Iterator[str]:
    """Yield what a job's log has got since the last look, until the job has ended."""
    seen = 0
    while True:
        done = ended.come()
        with contextlib.suppress(OSError), job.paths.stdout.open("rb") as file:
            file.seek(seen)
            new = file.read()
            seen += len(new)
            yield new.decode(errors="replace")
        if done:
            return
        time.sleep(POLL_SECONDS)


def _ending(job: Any, state: str) -> tuple[str, str]:
    """Return how a job ended by the first task, which speaks for all, or else by Slurm: a run's status, and why."""
    from submitit.core.utils import pickle_load

    try:
        outcome, result = pickle_load(job.paths.result_pickle)
    except (OSError, EOFError):
        said = _last_line(job.paths.stderr)
        return ("FAILED" if state == "COMPLETED" else OVER[state]), f"job {job.job_id} is {state}: {said}"
    if outcome == "error":  # with a traceback, of which the last line says what is wrong
        return "FAILED", f"job {job.job_id}: {str(result).strip().splitlines()[-1]}"
    if result == 0:
        return "FINISHED", ""
    reason = f"job {job.job_id} ended with exit code {result}; its log is {job.paths.stdout}"
    return ("KILLED" if result in STOPPED else "FAILED"), reason


def _last_line(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip().splitlines()[-1]
    except (OSError, IndexError):
        return "it has said nothing"
