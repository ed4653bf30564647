"""Where the trainings of a sweep run, some at once: on this machine, on a cluster by submitit, or by Ray.

Each is a process of its own under all three. A worker of joblib's that is killed takes the others down with it, which a
sweep must survive; therefore this machine's are plain processes.
"""

import logging
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout

from mlflow_ssl.datamodules.loading import usable_cores
from mlflow_ssl.errors import InputError
from mlflow_ssl.sweeps.process import KILL, Training, begin, kill, supervise

log = logging.getLogger(__name__)

LOST = -signal.SIGKILL
"""Exit code of a training whose machine, or whose launcher's own process, is gone."""


class Job(Protocol):
    """A training that was started."""

    def poll(self) -> int | None:
        """Return its exit code; None while it runs, or waits to be run."""

    def stop(self) -> None:
        """Have it save and end."""

    def kill(self) -> None:
        """End it at once."""


class Launcher(Protocol):
    """What starts trainings."""

    def start(self, training: Training) -> Job:
        """Start a training, or put it into a queue."""

    def close(self) -> None:
        """Give back what was taken."""


# this machine


class LocalLauncher:
    """Start trainings on this machine, and share out its GPUs or processors.

    Args:
        jobs: how many at once; None for one on each GPU, or one.
    """

    def __init__(self, jobs: int | None) -> None:
        gpus = visible_gpus()
        self.jobs = jobs or max(len(gpus), 1)
        self._shares = shares(self.jobs, gpus=gpus, cores=usable_cores())
        self._taken: dict[int, LocalJob] = {}

    def start(self, training: Training) -> "LocalJob":
        """Start a training on a share that no other has."""
        free = [slot for slot in range(self.jobs) if slot not in self._taken or self._taken[slot].poll() is not None]
        slot = free[0]
        given = {key: value for key, value in self._shares[slot].items() if key != "OMP_NUM_THREADS" or _unset(key)}
        self._taken[slot] = LocalJob(training, given)
        return self._taken[slot]

    def close(self) -> None:
        """Nothing was taken."""


class LocalJob:
    """A process of this machine."""

    def __init__(self, training: Training, environment: Mapping[str, str]) -> None:
        self._process = begin(training, environment)
        self._stopped = False

    def poll(self) -> int | None:
        """Return its exit code, negative for the signal that killed it; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Send SIGTERM, once: a second one does not wait for anything to be saved."""
        if not self._stopped:
            self._stopped = True
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL to it and its workers."""
        kill(self._process)


def visible_gpus() -> list[str]:
    """Return the GPUs of this machine as ``CUDA_VISIBLE_DEVICES`` names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(torch.cuda.device_count())]


def shares(jobs: int, *, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """Return what each of several trainings at once may take, as environment variables.

    Example:
        >>> [share["CUDA_VISIBLE_DEVICES"] for share in shares(2, gpus=["0", "1", "2", "3"], cores=8)]
        ['0,1', '2,3']
        >>> shares(3, gpus=["0", "1"], cores=8)[2]
        {'OMP_NUM_THREADS': '2', 'CUDA_VISIBLE_DEVICES': '0'}
        >>> shares(1, gpus=[], cores=8)
        [{}]
    """
    if jobs == 1:
        return [{}]
    each = max(len(gpus) // jobs, 1)
    found = []
    for slot in range(jobs):
        devices = [gpus[(slot * each + number) % len(gpus)] for number in range(each)] if gpus else []
        share = {"OMP_NUM_THREADS": str(max(cores // jobs, 1))}
        found.append(share | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}))
    return found


def _unset(key: str) -> bool:
    return key not in os.environ


# elsewhere


class _RemoteJob(ABC):
    """A training that `supervise` looks after where it runs, and that a file tells to stop."""

    def __init__(self, training: Training) -> None:
        self._stop_file = training.stop_file
        self._stop_file.unlink(missing_ok=True)

    def stop(self) -> None:
        """Have it save and end; nothing begins that has waited in a queue until now."""
        self._stop_file.touch()

    def kill(self) -> None:
        """End it at once, and take it out of the queue."""
        self._stop_file.write_text(KILL)
        self._cancel()

    @abstractmethod
    def _cancel(self) -> None: ...


class SubmititLauncher:
    """Submit trainings to Slurm, or with ``cluster: local`` to processes of this machine.

    Args:
        options: for the executor's ``update_parameters``, beside ``cluster``.
        folder: for its scripts and logs, which all machines see.

    Raises:
        InputError: if submitit is not installed, or refuses the options.
    """

    def __init__(self, options: Mapping[str, Any], folder: Path) -> None:
        submitit = _imported("submitit")
        settings = {key: value for key, value in options.items() if key != "cluster"}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=options.get("cluster"))
            self._executor.update_parameters(name="mlflow_ssl", **settings)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise InputError(f"sweep.submitit must be what submitit takes, got {settings}: {error}") from error

    def start(self, training: Training) -> "SubmititJob":
        """Submit a training."""
        return SubmititJob(training, self._executor)

    def close(self) -> None:
        """Nothing was taken."""


class SubmititJob(_RemoteJob):
    """A job of submitit's."""

    def __init__(self, training: Training, executor: Any) -> None:
        super().__init__(training)
        self._job = executor.submit(supervise, training)

    def poll(self) -> int | None:
        """Return the exit code; `LOST` if the job is gone without one, None while it runs or waits."""
        if not self._job.done():
            return None
        try:
            return int(self._job.result())
        except Exception as error:  # submitit's own errors, and whatever the job raised
            log.warning("job %s of submitit: %r", self._job.job_id, error)
            return LOST

    def _cancel(self) -> None:
        self._job.cancel()


class RayLauncher:
    """Run trainings as tasks of Ray's: of the cluster at ``address``, or of one that is started on this machine.

    Args:
        options: for ``ray.remote``, such as ``num_gpus``, beside ``address``.

    Raises:
        InputError: if Ray is not installed, or the cluster does not answer.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._ray = _imported("ray")
        settings = {key: value for key, value in options.items() if key != "address"}
        address = options.get("address")
        try:
            self._ray.init(address=address, log_to_driver=False, configure_logging=False, **_small(address))
            # a worker of its own for each, and a training that is lost is our business, not Ray's
            self._supervise = self._ray.remote(**settings, max_retries=0, max_calls=1)(supervise)
        except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"sweep.ray must be what Ray takes, got {dict(options)}: {error}") from error

    def start(self, training: Training) -> "RayJob":
        """Hand a training to Ray."""
        return RayJob(training, self._ray, self._supervise)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()


def _small(address: str | None) -> dict[str, Any]:
    # a Ray of our own carries paths and exit codes: it needs no dashboard, and no third of the memory for objects
    return {} if address else {"include_dashboard": False, "object_store_memory": 80 * 2**20}


class RayJob(_RemoteJob):
    """A task of Ray's."""

    def __init__(self, training: Training, ray: Any, task: Any) -> None:
        super().__init__(training)
        self._ray = ray
        self._reference = task.remote(training)

    def poll(self) -> int | None:
        """Return the exit code; `LOST` if the task is gone without one, None while it runs or waits."""
        done, _ = self._ray.wait([self._reference], timeout=0)
        if not done:
            return None
        try:
            return int(self._ray.get(self._reference))
        except Exception as error:  # Ray's own errors, and whatever the task raised
            log.warning("a task of Ray's: %r", error)
            return LOST

    def _cancel(self) -> None:
        self._ray.cancel(self._reference)


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(
            f"sweep.launcher={name} needs a package that is not installed; pip install 'mlflow_ssl[{name}]'"
        ) from error


# left over


class AdoptedJob:
    """A training that a sweep started which was killed itself: it goes on, and has its output folder locked.

    Args:
        lock: file that is locked while it runs.
        training: what it was started as.
    """

    def __init__(self, lock: Path, training: Training) -> None:
        self._lock = lock
        self._stop_file = training.stop_file

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        try:
            with FileLock(self._lock, blocking=False):
                return False
        except Timeout:
            return True

    def poll(self) -> int | None:
        """Return `LOST` when it has ended, however it did, which its folder knows; None while it runs."""
        return None if self.running else LOST

    def stop(self) -> None:
        """Have it save and end, if it is one that looks at the file; others go on by themselves."""
        self._stop_file.touch()

    def kill(self) -> None:
        """Leave it alone: its process is not known."""
