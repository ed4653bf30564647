"""Opening, linking and naming runs."""

import subprocess
import sys

import pytest
from mlflow import MlflowClient

from mlflow_ssl.tracking.run import Run, _without_password, tracked_run

pytestmark = pytest.mark.filterwarnings("default")  # SQLAlchemy's notices to MLflow

CONFIG = {
    "core": {"name": "mine", "tag": "run"},
    "backbone": {"model_name": "resnet18"},
    "tracking": {"uri": None, "system_metrics": False},
}


@pytest.fixture
def main_log(store, tmp_path):
    file = tmp_path / "main.log"
    file.write_text("said")
    return file


def test_a_run_of_ours_has_a_name_of_its_own_in_the_experiment_of_the_config(store, main_log):
    names = set()
    for _ in range(2):
        with tracked_run(CONFIG, main_log=main_log) as run:
            found = store.get_run(run.run_id)
            names.add(found.info.run_name)
            assert store.get_experiment(found.info.experiment_id).name == "mine"
    assert len(names) == 2
    assert all(name.startswith("run-resnet18-") for name in names)


def test_a_job_stays_in_the_experiment_that_its_environment_names(store, main_log, monkeypatch):
    given = store.create_experiment("given")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", given)
    with tracked_run(CONFIG, main_log=main_log) as run:
        assert store.get_run(run.run_id).info.experiment_id == given


def test_system_metrics_are_logged_when_asked_for(store, main_log, monkeypatch):
    import time

    import mlflow

    mlflow.set_system_metrics_sampling_interval(0.1)
    try:
        config = CONFIG | {"tracking": {"uri": None, "system_metrics": True}}
        with tracked_run(config, main_log=main_log) as run:
            time.sleep(1.0)
        metrics = store.get_run(run.run_id).data.metrics
    finally:
        mlflow.set_system_metrics_sampling_interval(None)
    assert [name for name in metrics if name.startswith("system/cpu")]


def test_the_link_of_a_server_is_the_servers_and_of_a_file_that_of_a_ui(store):
    run = Run(store, "r", "1")
    assert run.link == "http://127.0.0.1:5000/#/experiments/1/runs/r?workflowType=machine_learning"
    assert run.ui_command == f"mlflow ui --backend-store-uri {store.tracking_uri}"


def test_neither_link_nor_command_shows_a_password():
    server = Run(MlflowClient("https://me:secret@host:1"), "r", "1")
    database = Run(Named("postgresql://me:secret@host/db"), "r", "1")
    assert server.link.startswith("https://host:1/#/")
    assert database.ui_command == "mlflow ui --backend-store-uri postgresql://host/db"


class Named:
    """A client of a store that is not there."""

    def __init__(self, tracking_uri):
        self.tracking_uri = tracking_uri


def test_a_password_in_a_uri_is_not_shown():
    assert _without_password("https://me:secret@host:1/x") == "https://host:1/x"


@pytest.mark.slow
def test_processes_that_open_a_fresh_store_at_once_all_get_a_run(tmp_path):
    code = (
        "import pathlib\nfrom mlflow_ssl.tracking.run import tracked_run\n"
        f"config = {CONFIG!r}\n"
        "with tracked_run(config, main_log=pathlib.Path('main.log')): pass"
    )
    (tmp_path / "main.log").touch()
    environment = {"PATH": "", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/fresh.db", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
    started = [subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(3)]
    assert [process.wait(timeout=180) for process in started] == [0, 0, 0]
