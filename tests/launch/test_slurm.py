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
        *("trainer.devices=4", "trainer.num_nodes=2", "trainer.strategy=ddp"),
    )
    assert job.resume == "resume=abc"


def test_what_is_no_training_is_one_process_and_begins_anew():
    job = slurm._job(project("embed"), SlurmSettings(tasks_per_node=4))
    assert job.words == (sys.executable, "-m", "mlflow_ssl", "embed")
    assert job.resume is None


def test_a_stopped_job_is_told_to_save_and_goes_on_in_its_run(tmp_path):
    saving = "import pathlib, signal, sys; signal.signal(15, lambda *_: sys.exit(pathlib.Path('saved').touch())); "
    job = Job(
        (sys.executable, "-c", f"{saving}pathlib.Path('begun').touch(); signal.pause()"), str(tmp_path), {}, "go=on"
    )
    job._process = slurm.subprocess.Popen(job.words, cwd=tmp_path)
    while not (tmp_path / "begun").exists():
        pass
    again = job.checkpoint().function
    assert (tmp_path / "saved").exists()
    assert again.words == (*job.words, "go=on")
    # once is enough, however often it is stopped
    assert again.checkpoint().function.words == again.words


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
    assert parameters["additional_parameters"] == {"account": "vision"}


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
