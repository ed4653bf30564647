"""The runs below a sweep's: opened, spoken for and ended by its process, and the best of them registered."""

import pytest
from mlflow.exceptions import MlflowException
from packages import package, tiny_network

from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.children import Children, all_sent, status_of, was_opened
from mlflow_ssl.tracking.journal import Journal
from mlflow_ssl.tracking.note import UNREGISTERED
from mlflow_ssl.tracking.run import FOLDER, RunRecord, lock_output

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def children(store):
    """The children of a run."""
    parent = store.create_run(store.create_experiment("here"))
    return Children(store, RunRecord(parent.info.run_id, parent.info.experiment_id, store.tracking_uri))


def test_a_child_is_opened_below_its_parent_in_the_same_experiment(store, children):
    run_id = children.open("000 optimizer.lr=0.1", {"sweep.overrides": "tracking.uri=http://me:hunter2@host"})
    run = store.get_run(run_id)
    parent = store.get_run(run.data.tags["mlflow.parentRunId"])
    assert run.info.experiment_id == parent.info.experiment_id
    assert run.info.run_name == "000 optimizer.lr=0.1"
    assert run.data.tags["sweep.overrides"] == "tracking.uri=http://***@host"
    assert children.environment(run_id)["MLFLOW_RUN_ID"] == run_id


def test_while_mlflow_is_away_nothing_is_opened_and_what_was_said_waits(store, children, monkeypatch):
    run_id = children.open("000", {})

    def away(*_, **__):
        raise MlflowException("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "create_run", away)
        patch.setattr(type(store), "set_tag", away)
        assert children.open("001", {}) is None
        children.say(run_id, {"sweep.state": "finished"})
        assert not children.drain(patience=0)
    assert children.drain(patience=0)
    assert store.get_run(run_id).data.tags["sweep.state"] == "finished"


def test_a_process_that_died_is_spoken_for(store, children, tmp_path):
    run_id = children.open("000", {})
    RunRecord(run_id, store.get_run(run_id).info.experiment_id, store.tracking_uri).write(tmp_path)
    journal = Journal(tmp_path / FOLDER, "records")
    journal.append({"kind": "metrics", "metrics": [["val_acc", 0.5, 1, 7]]})
    journal.close()  # and nobody has sent it
    assert (was_opened(tmp_path), status_of(tmp_path)) == (True, None)
    children.settle(run_id, tmp_path, status="KILLED", reason="its process was killed by SIGKILL")
    run = store.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"val_acc": 0.5}  # what it had only written down
    assert all_sent(tmp_path)


def test_a_process_that_died_before_it_opened_its_run_is_ended_with_the_reason(store, children, tmp_path):
    run_id = children.open("000", {})
    assert status_of(tmp_path) is None
    children.settle(run_id, tmp_path, status="FAILED", reason="no module named torch")
    run = store.get_run(run_id)
    assert (run.info.status, run.data.tags["mlflow_ssl.reason"]) == ("FAILED", "no module named torch")


def test_the_best_is_registered_once_as_its_own_runs(store, children, tmp_path):
    run_id = children.open("000", {"mlflow.note.content": f"Load:\n{UNREGISTERED}\n"})
    record = RunRecord(run_id, store.get_run(run_id).info.experiment_id, store.tracking_uri, status="FINISHED")
    record.write(tmp_path)
    assert children.register(tmp_path, patience=60) is None  # nothing is packaged
    package(tmp_path / "registration" / "step-7", tiny_network())
    for _ in range(2):
        assert children.register(tmp_path, patience=60) == ("tiny", "1")
    (version,) = store.search_model_versions("name = 'tiny'")
    assert version.run_id == run_id
    tags = store.get_run(run_id).data.tags
    assert 'load_model("models:/tiny/1")' in tags["mlflow.note.content"]
    assert UNREGISTERED not in tags["mlflow.note.content"]
    assert tags["sweep.best"] == "true"
    lock = lock_output(tmp_path)
    try:
        with pytest.raises(InputError, match="another process is writing to"):
            children.register(tmp_path, patience=0)
    finally:
        lock.release()
