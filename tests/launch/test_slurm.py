import contextlib
import pickle
import signal
import sys
import threading
from pathlib import Path

import pytest
from mlflow.exceptions import ExecutionException

from mlflow_ssl.launch import slurm
from mlflow_ssl.launch.project import Project
from mlflow_ssl.launch.slurm import Job, SlurmBackend, SlurmSettings

pytest.importorskip("submitit")


def project(*words):
    return Project(Path("/project"), "abc", ("python", "-m", "mlflow_ssl", *words), {"MLFLOW_RUN_ID": "abc"})


def test_a_training_is_spread_over_the_tasks():
    job = slurm._job(project("--experiment", "byol"), SlurmSettings(nodes=2, tasks_per_node=4))
    assert job.words == (
        *(sys.executable, "-m", "mlflow_ssl", "--experiment", "byol"),
        *("trainer.devices=4", "trainer.num_nodes=2"),
    )


def test_there_is_a_task_a_gpu_unless_asked_otherwise():
    assert SlurmSettings().tasks == 1
    assert SlurmSettings(gpus_per_node=4).tasks == 4
    assert SlurmSettings(gpus_per_node=4, tasks_per_node=2).tasks == 2


def test_what_is_no_training_is_one_process():
    job = slurm._job(project("embed"), SlurmSettings(tasks_per_node=4))
    assert job.words == (sys.executable, "-m", "mlflow_ssl", "embed")


def test_a_stopped_job_is_told_to_save_and_does_the_same_again(tmp_path):
    saving = "import pathlib, signal, sys; signal.signal(15, lambda *_: sys.exit(pathlib.Path('saved').touch())); "
    job = Job((sys.executable, "-c", f"{saving}pathlib.Path('begun').touch(); signal.pause()"), str(tmp_path), {})
    job._process = slurm.subprocess.Popen(job.words, cwd=tmp_path)
    while not (tmp_path / "begun").exists():
        pass
    again = job.checkpoint().function
    assert (tmp_path / "saved").exists()
    assert (again.words, again.folder, again._process) == (job.words, job.folder, None)


def test_the_signal_of_a_time_that_is_nearly_over_does_not_reach_the_training(tmp_path):
    """Slurm sends it to every process of a job, before submitit's handler can have the training save."""
    job = Job((sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGUSR2)"), str(tmp_path), {})
    assert job() == 0


def test_a_cancelled_job_leaves_no_process_behind(tmp_path):
    job = Job((sys.executable, "-c", "import time; time.sleep(600)"), str(tmp_path), {})
    with signalled(_interrupt), pytest.raises(KeyboardInterrupt):
        job()
    assert job._process.poll() == -signal.SIGTERM


def test_a_running_job_that_is_stopped_waits_no_longer_than_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "STOP_SECONDS", 600)  # until a test would be ended
    job = Job((sys.executable, "-c", "import time; time.sleep(600)"), str(tmp_path), {})
    with signalled(lambda *_: job.checkpoint()):
        assert job() == -signal.SIGTERM


@contextlib.contextmanager
def signalled(handler):
    """Have a signal come in half a second, and handle it."""
    before = signal.signal(signal.SIGUSR2, handler)
    threading.Timer(0.5, signal.raise_signal, [signal.SIGUSR2]).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_job_is_pickled_without_its_process(tmp_path):
    job = Job((sys.executable, "-c", "pass"), str(tmp_path), {})
    assert job() == 0
    assert pickle.loads(pickle.dumps(job))._process is None


def test_all_parameters_reach_slurm(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    settings = SlurmSettings(
        nodes=2, mem_gb=32, partition="gpu", parameters={"account": "vision"}, setup=["module load x"]
    )
    parameters = slurm._executor(tmp_path, settings).parameters
    assert parameters["nodes"] == 2
    assert (parameters["mem"], parameters["partition"], parameters["time"]) == ("32GB", "gpu", 60)
    assert parameters["additional_parameters"] == {"account": "vision", "requeue": True}
    assert parameters["srun_args"] == ["--cpus-per-task=1"]


class Slurm:
    """Answers as Slurm's programs do: what they are asked, and what they say."""

    def __init__(self, **answers):
        self.asked = []
        self._answers = answers

    def __call__(self, command):
        self.asked.append(command[0])
        return self._answers.get(command[0], "")


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        ({"scontrol": "JobId=7 JobName=submitit JobState=RUNNING Reason=None"}, "RUNNING"),
        ({"scontrol": "slurm_load_jobs error: Unable to contact slurm controller"}, "UNKNOWN"),
        ({"scontrol": "slurm_load_jobs error: Invalid job id specified", "sacct": "CANCELLED by 0\n"}, "CANCELLED"),
        ({"scontrol": "slurm_load_jobs error: Invalid job id specified", "sacct": "Slurm accounting"}, "FORGOTTEN"),
    ],
)
def test_a_jobs_state_is_the_controllers_word_or_the_accountings(monkeypatch, answers, state):
    monkeypatch.setattr(slurm, "_said", Slurm(**answers))
    assert slurm.slurm_state(SubmittedJob(Path("none"))) == state


class SubmittedJob:
    """A job of submitit, and where its first task leaves its exit code and what it says."""

    job_id = "7"

    def __init__(self, folder):
        self.paths = self
        self.result_pickle = folder / "result.pkl"
        self.stderr = folder / "log.err"
        self.stdout = folder / "log.out"


def test_a_task_that_was_stopped_for_another_job_is_not_the_end(tmp_path):
    """A preempted task ends by itself, and Slurm puts the job back into the queue."""
    job = SubmittedJob(tmp_path)
    states = iter(["RUNNING", "PENDING", "RUNNING", "COMPLETED"])
    end = slurm._End(job, lambda _: next(states))
    assert not end.come()  # nothing has happened, and nobody was asked
    assert end.state == "PENDING"
    job.result_pickle.write_bytes(pickle.dumps(("success", 143)))
    assert [end.come(), end.come()] == [False, False]
    assert end.state == "PENDING"
    assert not end.come()  # the result is the one from before
    job.result_pickle.unlink()
    assert [end.come(), end.come()] == [False, True]


@pytest.mark.parametrize(
    ("result", "state", "status"),
    [
        (("success", 0), "COMPLETED", "FINISHED"),
        (("success", 2), "COMPLETED", "FAILED"),
        (("success", -signal.SIGTERM), "CANCELLED", "KILLED"),
        (("error", "Traceback\nUncompletedJobError: timed-out too many times\n"), "FAILED", "FAILED"),
        (None, "CANCELLED", "KILLED"),
        (None, "OUT_OF_MEMORY", "FAILED"),
        (None, "COMPLETED", "FAILED"),
    ],
)
def test_a_job_ends_as_its_first_task_or_else_as_slurm_says(tmp_path, result, state, status):
    job = SubmittedJob(tmp_path)
    job.stderr.write_text("slurmstepd: error: Detected 1 oom_kill event\n")
    if result is not None:
        job.result_pickle.write_bytes(pickle.dumps(result))
    ended, reason = slurm._ending(job, state)
    assert ended == status
    if result is None:
        assert reason == f"job 7 is {state}: slurmstepd: error: Detected 1 oom_kill event"


def test_a_machine_without_slurm_says_so_and_ends_the_run(store, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "is_local", lambda uri: False)
    (tmp_path / "MLproject").write_text("name: p\nentry_points: {main: {command: 'python -m mlflow_ssl'}}\n")
    with pytest.raises(ExecutionException, match="Slurm does not take the job"):
        SlurmBackend().run(str(tmp_path), "main", {}, None, {}, store.tracking_uri, "0")
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FAILED"


def test_a_store_that_the_nodes_cannot_reach_is_refused_before_a_run_is_opened(store):
    with pytest.raises(ExecutionException, match="the tracking store must be one that the nodes can reach, got sqlite"):
        SlurmBackend().run(".", "main", {}, None, {}, store.tracking_uri, "0")
    assert not store.search_runs(["0"])
