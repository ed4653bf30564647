"""An earlier run is found, and what it left behind: in its output folder, or in MLflow."""

import os
import shutil

import pytest
import torch

from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.lifecycle import end_launched_run
from mlflow_ssl.tracking.opening import OUTPUT_TAG
from mlflow_ssl.tracking.run import RunRecord
from mlflow_ssl.tracking.stored import StoredRun, begun_run, find_run

pytestmark = pytest.mark.filterwarnings("default")  # SQLAlchemy's notices to MLflow


@pytest.fixture
def experiment(store):
    return store.create_experiment("mine")


@pytest.fixture
def new_run(store, experiment, tmp_path):
    """Return a function that makes a run of ours with an output folder, and gives the two."""

    def make(name, *, start_time=None):
        output = tmp_path / name
        output.mkdir()
        run = store.create_run(experiment, start_time=start_time, tags={OUTPUT_TAG: str(output), "data.digest": "d1"})
        RunRecord(run.info.run_id, experiment, store.tracking_uri).write(output)
        return run.info.run_id, output

    return make


def find(wanted, experiment="mine"):
    return find_run(wanted, experiment=experiment, uri=None)


def test_a_run_is_found_by_its_id(new_run):
    run_id, output = new_run("out")
    found = find(run_id, experiment="another")
    assert (found.run_id, found.data_digest, found.output_folder()) == (run_id, "d1", output)


def test_a_run_is_found_in_another_store(new_run, store, monkeypatch):
    run_id, _ = new_run("out")
    uri = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    assert find_run(run_id, experiment="", uri=uri).run_id == run_id


def test_a_launchers_run_is_begun_once_a_training_has_taken_it_over(new_run, store, experiment, monkeypatch):
    assert begun_run(None) is None  # there is no launcher
    launched = store.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    assert begun_run(None) is None
    store.set_tag(launched, OUTPUT_TAG, "out")
    assert begun_run(None) == launched


def test_a_finished_run_that_is_started_again_stays_finished(store, experiment):
    run_id = store.create_run(experiment).info.run_id
    store.set_terminated(run_id, "FINISHED")
    end_launched_run(run_id, status="FAILED", reason="it is finished")
    run = store.get_run(run_id)
    assert (run.info.status, run.data.tags.get("mlflow_ssl.reason")) == ("FINISHED", None)


def test_an_unknown_id_is_named(store):
    with pytest.raises(InputError, match=r"there is no run 0123 in sqlite:///.*mlflow.db; look for its id in the UI"):
        find("0123")


def test_a_run_of_others_is_refused(store, experiment):
    run_id = store.create_run(experiment).info.run_id
    with pytest.raises(InputError, match=rf"run {run_id} is not one that mlflow_ssl trained: it has no tag"):
        find(run_id)


def test_a_deleted_run_is_refused_with_the_command_that_restores_it(new_run, store):
    run_id, _ = new_run("out")
    store.delete_run(run_id)
    with pytest.raises(InputError, match=rf"was deleted; restore it first: mlflow runs restore --run-id {run_id}"):
        find(run_id)


def test_last_is_the_run_of_ours_that_started_last_and_is_not_deleted(new_run, store, experiment):
    new_run("first", start_time=1000)
    last, _ = new_run("last", start_time=3000)
    between, _ = new_run("between", start_time=2000)
    gone, _ = new_run("gone", start_time=4000)
    store.delete_run(gone)
    store.create_run(experiment, start_time=5000)  # not ours
    assert find("last").run_id == last
    store.delete_run(last)
    assert find("last").run_id == between


def test_last_is_of_the_experiment_that_new_runs_go_to(new_run, store, monkeypatch):
    run_id, _ = new_run("out")
    store.create_experiment("empty")
    for other in ("empty", "not there"):
        with pytest.raises(InputError, match=f"there is no run to resume in experiment '{other}'"):
            find("last", experiment=other)
    # as the experiment of a run that `mlflow run` has opened
    launched = store.create_run(store.get_run(run_id).info.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    assert find("last", experiment="empty").run_id == run_id


def test_an_output_folder_that_is_gone_is_none(new_run):
    run_id, output = new_run("out")
    shutil.rmtree(output)
    assert find(run_id).output_folder() is None


def test_an_output_folder_that_is_another_runs_by_now_is_none(new_run, store):
    run_id, output = new_run("out")
    RunRecord("another", "1", store.tracking_uri).write(output)
    assert find(run_id).output_folder() is None


def test_a_config_is_read_from_the_output_folder_first(new_run, store):
    run_id, output = new_run("out")
    store.log_text(run_id, "a: artifact", "config/config_resolved.yaml")
    assert find(run_id).read_yaml("config_resolved.yaml", output) == {"a": "artifact"}
    (output / "config_resolved.yaml").write_text("a: folder")
    assert find(run_id).read_yaml("config_resolved.yaml", output) == {"a": "folder"}
    assert find(run_id).read_yaml("config_resolved.yaml") == {"a": "artifact"}


def test_a_config_that_is_nowhere_is_named(new_run):
    run_id, output = new_run("out")
    message = rf"run {run_id} has no artifact config/config_resolved.yaml that can be fetched: "
    with pytest.raises(InputError, match=message) as caught:
        find(run_id).read_yaml("config_resolved.yaml", output)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "a: !!python/object/apply:os.mkdir [ran]"])
def test_a_config_that_is_no_plain_yaml_is_refused(new_run, store, text):
    run_id, _ = new_run("out")
    store.log_text(run_id, text, "config/config_resolved.yaml")
    with pytest.raises(InputError, match=rf"config/config_resolved.yaml of run {run_id} is no YAML"):
        find(run_id).read_yaml("config_resolved.yaml")
    assert not os.path.exists("ran")  # noqa: PTH110


def write(folder, **files):
    """Write checkpoints that hold a number."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in files.items():
        torch.save({"number": number}, folder / f"{name}.ckpt")
    return folder


def number(file):
    return torch.load(file, weights_only=True)["number"]


@pytest.fixture
def uploaded(new_run, store, tmp_path):
    """Return a run with checkpoints among its artifacts, and its output folder."""
    run_id, output = new_run("out")
    store.log_artifacts(run_id, str(write(tmp_path / "up", last=1, best=2)), "checkpoints")
    return find(run_id), output


def test_the_last_checkpoint_is_that_of_the_output_folder(uploaded):
    run, output = uploaded
    write(output / "checkpoints", last=3)
    assert number(run.checkpoint(output)) == 3
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 100), lambda file: file.write_bytes(b"")])
def test_a_damaged_one_is_replaced_by_the_uploaded_one(uploaded, damage, caplog):
    run, output = uploaded
    damage(write(output / "checkpoints", last=3, best=4) / "last.ckpt")
    assert number(run.checkpoint(output)) == 1
    assert number(output / "checkpoints" / "best.ckpt") == 2  # they go together
    assert "cannot be read" in caplog.text


def test_in_a_new_output_folder_the_checkpoints_are_the_uploaded_ones(uploaded, tmp_path):
    run, _ = uploaded
    file = run.checkpoint(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "checkpoints" / "last.ckpt"
    assert {path.name: number(path) for path in file.parent.iterdir()} == {"last.ckpt": 1, "best.ckpt": 2}


def test_a_run_without_a_checkpoint_has_none(new_run, store, tmp_path):
    run_id, output = new_run("out")
    assert find(run_id).checkpoint(output) is None
    store.log_artifacts(run_id, str(write(tmp_path / "up", best=2)), "checkpoints")
    assert find(run_id).checkpoint(output) is None
    write(output / "checkpoints", last=3)
    os.truncate(output / "checkpoints" / "last.ckpt", 100)
    assert find(run_id).checkpoint(output) is None


def test_a_stored_run_knows_its_tags(new_run, store):
    run_id, output = new_run("out")
    assert StoredRun(store, store.get_run(run_id)).tags[OUTPUT_TAG] == str(output)
