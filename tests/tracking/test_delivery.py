"""What is sent stands in a real store, once, however often it is sent."""

import pytest
from mlflow.entities import Dataset

from mlflow_ssl.tracking.delivery import FileDelivery, RecordDelivery

pytestmark = pytest.mark.filterwarnings("default")  # SQLAlchemy's notices to MLflow


@pytest.fixture
def run_id(store):
    return store.create_run(store.create_experiment("here")).info.run_id


@pytest.fixture
def records(store, run_id):
    return RecordDelivery(store, run_id)


@pytest.fixture
def files(store, run_id, tmp_path):
    return FileDelivery(store, run_id, tmp_path / "output")


@pytest.fixture
def output(tmp_path):
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


def metrics(*values, key="train/loss"):
    return {"kind": "metrics", "metrics": [[key, value, 1_700_000_000_000 + step, step] for step, value in values]}


def params(names, value="1"):
    return {"kind": "params", "params": dict.fromkeys(names, value)}


def tags(names, value="1"):
    return {"kind": "tags", "tags": dict.fromkeys(names, value)}


def history(store, run_id, key="train/loss"):
    return [(point.step, point.value, point.timestamp) for point in store.get_metric_history(run_id, key)]


def artifacts(store, run_id, folder=None):
    return sorted(info.path for info in store.list_artifacts(run_id, folder))


def test_metrics_params_and_tags_go_in_one_request(store, run_id, records):
    entries = [metrics((0, 0.5)), params(["core.seed"], "42"), tags(["data.digest"], "abc"), metrics((1, 0.25))]
    assert records(entries) == 4
    data = store.get_run(run_id).data
    assert history(store, run_id) == [(0, 0.5, 1_700_000_000_000), (1, 0.25, 1_700_000_000_001)]
    assert data.params == {"core.seed": "42"}
    assert data.tags["data.digest"] == "abc"


@pytest.mark.parametrize(
    ("entries", "fit"),
    [
        ([metrics((step, 0.0)) for step in range(3000)], 800),
        ([params([f"p{number}"]) for number in range(250)], 100),
        ([tags([f"t{number}"]) for number in range(250)], 100),
        ([params([f"p{number}" for number in range(100)])] * 3, 1),
        ([metrics(*((step, 0.0) for step in range(801)))] * 2, 1),  # one entry goes whatever its size
    ],
    ids=["metrics", "params", "tags", "full entries", "a large entry"],
)
def test_as_many_go_as_one_request_holds(records, entries, fit):
    assert records(entries) == fit


def test_of_all_kinds_no_more_go_than_one_request_holds(store, run_id, records):
    kinds = [metrics((number, 0.0)) for number in range(1000)]
    kinds[1:1] = [entry for number in range(150) for entry in (params([f"p{number}"]), tags([f"t{number}"]))]
    left, requests = kinds, 0
    while left:
        left, requests = left[records(left) :], requests + 1
    assert requests == 3
    assert len(history(store, run_id)) == 1000
    assert len(store.get_run(run_id).data.params) == 150


def test_a_dataset_goes_alone_and_in_its_turn(store, run_id, records):
    dataset = Dataset("digits", "d1", "local", "{}").to_dictionary()
    entries = [metrics((0, 0.5)), {"kind": "dataset", "dataset": dataset, "context": "train"}, metrics((1, 0.25))]
    assert records(entries) == 1
    assert records(entries[1:]) == 1
    assert history(store, run_id) == [(0, 0.5, 1_700_000_000_000)]
    (given,) = store.get_run(run_id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.tags[0].value) == ("digits", "d1", "train")


def test_what_is_sent_twice_is_there_once(store, run_id, records):
    dataset = Dataset("digits", "d1", "local", "{}").to_dictionary()
    entries = [metrics((0, 0.5), (1, 0.25)), params(["a"]), tags(["b"])]
    for _ in range(2):
        records(entries)
        records([{"kind": "dataset", "dataset": dataset, "context": "train"}])
    assert history(store, run_id) == [(0, 0.5, 1_700_000_000_000), (1, 0.25, 1_700_000_000_001)]
    assert len(store.get_run(run_id).inputs.dataset_inputs) == 1


def test_the_last_word_on_a_tag_stands(store, run_id, records):
    assert records([tags(["note"], "first"), tags(["note"], "second")]) == 2
    assert store.get_run(run_id).data.tags["note"] == "second"


def test_files_and_folders_go_where_they_are_told(store, run_id, files, output):
    (output / "main.log").write_text("said")
    (output / "data").mkdir()
    (output / "data" / "splits.csv").write_text("a,b")
    assert files([{"kind": "file", "path": "main.log", "folder": None}, {"kind": "file", "path": "x"}]) == 1
    for _ in range(2):
        files([{"kind": "file", "path": "data", "folder": "data"}])
    assert artifacts(store, run_id) == ["data", "main.log"]
    assert artifacts(store, run_id, "data") == ["data/splits.csv"]
    assert (output / "main.log").exists()


def test_a_snapshot_is_taken_away_once_it_has_arrived(store, run_id, files, output):
    snapshot = output / "tracking" / "outbox" / "ab" / "last.ckpt"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(b"state")
    entry = {"kind": "snapshot", "path": "tracking/outbox/ab/last.ckpt", "folder": "checkpoints"}
    assert files([entry]) == 1
    assert artifacts(store, run_id, "checkpoints") == ["checkpoints/last.ckpt"]
    assert list((output / "tracking" / "outbox").iterdir()) == []
    assert files([entry]) == 1  # its answer was lost
    assert artifacts(store, run_id, "checkpoints") == ["checkpoints/last.ckpt"]


def test_a_snapshot_whose_place_another_took_is_passed_over(store, run_id, files, output):
    assert files([{"kind": "snapshot", "path": "tracking/outbox/ab/last.ckpt", "folder": "checkpoints"}]) == 1
    assert artifacts(store, run_id) == []
