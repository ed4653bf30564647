import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import ExecutionException

from mlflow_ssl.errors import Interrupted
from mlflow_ssl.launch import ray_jobs
from mlflow_ssl.launch.project import Project
from mlflow_ssl.launch.ray_jobs import Ended, RayBackend, RaySettings

TRAINING = ("python", "-m", "mlflow_ssl", "--experiment", "byol")


def project(words=TRAINING, folder="/project"):
    return Project(Path(folder), "abc", words, {"MLFLOW_RUN_ID": "abc"})


def test_a_training_is_driven_by_ray_train_and_other_entry_points_are_run_as_they_are():
    settings = RaySettings(address="http://head:8265")
    assert ray_jobs._words(project(), settings) == [
        *("python", "-m", "mlflow_ssl.launch.ray_train"),
        *("--experiment", "byol"),
    ]
    embed = ("python", "-m", "mlflow_ssl", "embed", "--data_path", "x")
    assert ray_jobs._words(project(embed), settings) == list(embed)
    assert ray_jobs._words(project(embed), RaySettings())[0] == sys.executable


def test_a_cluster_gets_the_projects_files_and_packages(tmp_path):
    (tmp_path / "conda.yaml").write_text("dependencies: [python=3.11, {pip: ['torch>=2.11', timm]}]")
    settings = RaySettings(address="http://head:8265", environment={"NCCL_DEBUG": "INFO"})
    described = ray_jobs._runtime_env(project(folder=str(tmp_path)), settings)
    assert described["working_dir"] == str(tmp_path)
    assert described["uv"] == ["torch>=2.11", "timm"]
    assert described["env_vars"]["MLFLOW_RUN_ID"] == "abc"
    assert described["env_vars"]["NCCL_DEBUG"] == "INFO"
    bare = ray_jobs._runtime_env(project(folder=str(tmp_path)), settings.model_copy(update={"install": False}))
    assert "uv" not in bare


def test_the_driver_reads_what_the_backend_said(monkeypatch):
    settings = RaySettings(num_workers=3, resources_per_worker={"spot": 1.0})
    monkeypatch.setenv(ray_jobs.WORKERS, ray_jobs._runtime_env(project(), settings)["env_vars"][ray_jobs.WORKERS])
    assert ray_jobs.read_workers() == settings


def test_a_store_that_the_cluster_cannot_reach_is_refused_before_a_run_is_opened(store):
    config = {"address": "http://head:8265"}
    with pytest.raises(
        ExecutionException, match=r"the tracking store must be one that the cluster .* can reach, got sql"
    ):
        RayBackend().run(".", "main", {}, None, config, store.tracking_uri, "0")
    assert not store.search_runs(["0"])


class Client:
    """A job server whose jobs end as they are told."""

    def __init__(self, *ends):
        self.ends = list(ends)
        self.submitted, self.stopped = [], []

    def submit_job(self, *, submission_id, **_):
        self.submitted.append(submission_id)
        return submission_id


@pytest.fixture
def served(monkeypatch):
    """Return a function that lets jobs end one after the other, and gives the last end and all jobs."""

    def run(*ends, **settings):
        client = Client(*ends)
        monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: client)
        monkeypatch.setattr(ray_jobs, "_watch", lambda client, job: client.ends.pop(0))
        return ray_jobs._run_job(project(), RaySettings(**settings), "http://head:8265"), client.submitted

    return run


LOST = Ended("FAILED", None, "node died")


def test_a_lost_job_is_submitted_again(served):
    ended, jobs = served(LOST, Ended("FAILED", 137, "out of memory"), Ended("SUCCEEDED", 0, ""))
    assert ended.status == "SUCCEEDED"
    assert jobs == ["mlflow-ssl-abc-0", "mlflow-ssl-abc-1", "mlflow-ssl-abc-2"]


def test_a_job_is_submitted_no_more_often_than_allowed(served):
    ended, jobs = served(LOST, LOST, max_failures=1)
    assert (ended, len(jobs)) == (LOST, 2)


@pytest.mark.parametrize("end", [Ended("FAILED", 2, "a mistake"), Ended("FAILED", 1, ""), Ended("STOPPED", None, "")])
def test_what_would_end_in_the_same_way_is_not_tried_again(served, end):
    assert served(end) == (end, ["mlflow-ssl-abc-0"])


def test_a_signal_stops_the_job():
    stopped = []

    def status(job):
        raise Interrupted(15)

    client = SimpleNamespace(get_job_status=status, stop_job=stopped.append)
    with pytest.raises(Interrupted):
        ray_jobs._watch(client, "job")
    assert stopped == ["job"]
