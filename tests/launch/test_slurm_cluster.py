"""Trainings on a real Slurm of one node: its signals, its queue, its end of a job."""

import contextlib
import subprocess

import pytest
from launching import assert_one_whole_run, launched
from mlflow import MlflowClient
from servers import running_server, wait_until
from slurmd import running_slurm

pytest.importorskip("submitit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
EPOCHS = 60


@pytest.fixture(scope="module")
def cluster(migrated_store, tmp_path_factory):
    """Yield the settings that lead to a Slurm and a tracking server that its node can reach."""
    folder = tmp_path_factory.mktemp("server")
    with running_slurm() as config, running_server(folder, migrated_store) as server:
        yield {"SLURM_CONF": str(config), "MLFLOW_TRACKING_URI": server.uri}


@pytest.fixture
def experiment(cluster, request, monkeypatch):
    """Lead this test's runs to the cluster and into an experiment of their own."""
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(cluster["MLFLOW_TRACKING_URI"])
    number = client.create_experiment(request.node.name)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    return client, number


@contextlib.contextmanager
def submitted(data, folder, *, tasks, epochs=EPOCHS):
    """Start ``mlflow run`` with a job of some tasks, and yield it with the number of the job."""
    config = {"folder": "jobs", "timeout_min": 10, "tasks_per_node": tasks}
    with launched("slurm", config, data, folder, epochs=epochs) as process:

        def scripts():
            return list((folder / "jobs").glob("*/*_submission.sh"))

        wait_until(lambda: scripts() or process.poll() is not None, "the job is submitted")
        yield process, scripts()[0].name.partition("_")[0]


def signal_job(number, *words):
    subprocess.run(["scancel", *words, number], check=True)


def run_of(experiment):
    client, number = experiment
    (run,) = client.search_runs([number])
    return run


def test_a_job_whose_time_is_over_saves_and_goes_on_in_its_run(experiment, image_folder, tmp_path):
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    with submitted(image_folder({"a": 20, "b": 20}), tmp_path, tasks=2) as (process, job):
        wait_until(lambda: last.exists() or process.poll() is not None, "the training has saved")
        signal_job(job, "--signal=USR2")  # as before the end of its time: to every process of the job
        assert process.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
    run = run_of(experiment)
    assert_one_whole_run(experiment[0], run, backend="slurm", steps=EPOCHS)
    log = (tmp_path / "log").read_text()
    saved = log.index("SIGTERM: the training is saved at its next step, then it ends")
    assert f"going on with run {run.info.run_id} from {last}" in log[saved:]


def test_a_mistake_ends_the_run_failed_and_is_shown(experiment, tmp_path):
    with submitted(tmp_path / "nowhere", tmp_path, tasks=2) as (process, _):
        assert process.wait(120) == 1
    run = run_of(experiment)
    assert run.info.status == "FAILED"
    reason = run.data.tags["mlflow_ssl.reason"]
    assert str(tmp_path / "nowhere") in reason
    log = (tmp_path / "log").read_text()
    assert f"error: {reason}" in log
    assert "Traceback" not in log


def test_a_cancelled_job_ends_its_run_killed(experiment, image_folder, tmp_path):
    with submitted(image_folder({"a": 20, "b": 20}), tmp_path, tasks=1, epochs=10000) as (process, job):
        last = tmp_path / "out" / "checkpoints" / "last.ckpt"
        wait_until(lambda: last.exists() or process.poll() is not None, "the training has saved")
        signal_job(job)
        assert process.wait(120) == 1
    run = run_of(experiment)
    assert run.info.status == "KILLED"
    assert run.data.tags["mlflow_ssl.reason"] == "stopped by SIGTERM"
    assert f"run {run.info.run_id} ended KILLED" in (tmp_path / "log").read_text()


def test_a_job_that_never_began_ends_its_run_with_slurms_word(experiment, tmp_path):
    with submitted(tmp_path, tmp_path, tasks=5) as (process, job):  # the node has four processors
        signal_job(job)
        assert process.wait(120) == 1
    run = run_of(experiment)
    assert run.info.status == "KILLED"
    assert run.data.tags["mlflow_ssl.reason"] == f"job {job} is CANCELLED: it has said nothing"
