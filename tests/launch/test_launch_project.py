import pytest
from mlflow.exceptions import ExecutionException

from mlflow_ssl.errors import Interrupted
from mlflow_ssl.launch.project import Backend, absolute, closed, end, is_local, open_project, watched
from mlflow_ssl.launch.ray_jobs import RaySettings
from mlflow_ssl.launch.slurm import SlurmSettings

MLPROJECT = """
name: other
entry_points:
  main:
    parameters:
      experiment: {type: string, default: ""}
    command: "python -m mlflow_ssl --experiment {experiment}"
  embed:
    command: "python -m mlflow_ssl embed"
"""


@pytest.fixture
def opened(store, tmp_path):
    """Return a function that opens an entry point's run in the test's store."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "MLproject").write_text(MLPROJECT)

    def make(entry_point="main", **params):
        return open_project(
            str(tmp_path / "project"),
            entry_point,
            params,
            None,
            tracking_uri=store.tracking_uri,
            experiment_id="0",
            backend="ray",
        )

    return make


def test_mlflows_own_keys_are_not_the_users():
    given = {"num_workers": 2, "SYNCHRONOUS": False, "ENV_MANAGER": None, "build_image": False, "docker_auth": None}
    assert RaySettings.read(given) == RaySettings(num_workers=2)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (RaySettings, {"workers": 2}, "workers is wrong: Extra inputs are not permitted, got 2; it may hold address, "),
        (RaySettings, {"num_workers": 0}, "num_workers is wrong: .* greater than or equal to 1, got 0"),
        (SlurmSettings, {"cluster": "pbs"}, "cluster is wrong: Input should be 'slurm' or 'local', got 'pbs'"),
    ],
)
def test_a_wrong_backend_config_is_named(settings, given, message):
    with pytest.raises(ExecutionException, match=f"backend config: {message}"):
        settings.read(given)


def test_a_projects_run_is_open_and_its_command_logs_to_it(opened, store, tmp_path):
    project = opened(experiment="byol")
    assert project.folder == tmp_path / "project"
    assert project.words == ("python", "-m", "mlflow_ssl", "--experiment", "byol")
    assert project.environment["MLFLOW_RUN_ID"] == project.run_id
    run = store.get_run(project.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["mlflow.project.backend"] == "ray"


def test_credentials_go_along_and_nothing_else_of_the_environment(opened, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("HOMEWORK", "mine")
    environment = opened().environment
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "secret"
    assert "HOMEWORK" not in environment


def test_only_a_training_can_be_spread(opened):
    assert opened(experiment="byol").trains
    assert not opened("embed").trains


def test_a_relative_store_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("uri", ["sqlite:////data/mlflow.db", "file:///data", "/data/mlruns", "./mlruns"])
def test_a_store_on_this_machine_is_not_a_clusters(uri):
    assert is_local(uri)
    assert not is_local("http://tracking:5000")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Interrupted(15), "KILLED", "stopped by SIGTERM"),
        (ExecutionException("no such queue"), "FAILED", "no such queue"),
    ],
)
def test_what_stops_the_watch_ends_the_run(opened, store, error, status, reason):
    project = opened()
    with pytest.raises(type(error)), watched(project):
        raise error
    run = store.get_run(project.run_id)
    assert (run.info.status, run.data.tags["mlflow_ssl.reason"]) == (status, reason)


class Stopped(Backend):
    """A backend that is told to stop at once."""

    name, settings = "stopped", RaySettings

    def check(self, settings, tracking_uri):
        """Find nothing wrong."""

    def execute(self, project, settings):
        """Be told to stop."""
        raise Interrupted(15)


def test_a_backend_that_is_told_to_stop_says_so_in_a_line(opened, store, tmp_path, capsys):
    folder = opened().folder
    with pytest.raises(SystemExit) as left:
        Stopped().run(str(folder), "main", {}, None, {}, store.tracking_uri, "0")
    assert left.value.code == 143
    killed = store.search_runs(["0"], filter_string="attributes.status = 'KILLED'")
    assert capsys.readouterr().err.endswith(f"run {killed[0].info.run_id} ended KILLED: stopped by SIGTERM\n")


def test_a_run_that_has_ended_itself_stays_as_it_said(opened, store):
    project = opened()
    store.set_tag(project.run_id, "mlflow_ssl.reason", "no image could be read")
    store.set_terminated(project.run_id, "FAILED")
    assert end(project.run_id, "KILLED", "the job was stopped") == "FAILED"
    with pytest.raises(ExecutionException, match="ended FAILED: no image could be read"):
        closed(project, "FINISHED")


def test_a_job_that_ends_well_finishes_its_run(opened, store):
    ended = closed(opened("embed"), "FINISHED")
    assert ended.wait()
    assert store.get_run(ended.run_id).info.status == ended.get_status() == "FINISHED"
