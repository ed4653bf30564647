"""Each kind of store holds what a run said, once: where many speak at once, and where marks were lost."""

import subprocess
import sys

import mlflow
import pytest
import saying
from mlflow import MlflowClient
from saying import assert_holds, assert_holds_metrics, config, say
from servers import running_postgresql

from mlflow_ssl.cli import main
from mlflow_ssl.tracking.lifecycle import tracked_run

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database(request, store):
    """The URI of a database that MLflow writes to directly."""
    if request.param == "sqlite":
        yield store.tracking_uri
        return
    with running_postgresql() as uri:
        yield uri
        mlflow.set_tracking_uri(None)


def test_a_database_holds_all_once_though_it_is_sent_again(database, tmp_path):
    output = tmp_path / "output"
    with tracked_run(config(database), output=output) as run:
        say(run)
    client = MlflowClient(database)
    assert_holds(client, run.run_id, folder=tmp_path)
    for journal in ("records", "files"):
        mark = output / "tracking" / f"{journal}.sent"
        assert int(mark.read_text()) == mark.with_suffix(".jsonl").stat().st_size
        mark.unlink()
    assert main(["sync", str(output)]) == 0
    assert_holds(client, run.run_id, folder=tmp_path)


@pytest.mark.slow
def test_ten_runs_at_once_write_to_one_sqlite_file(store, tmp_path):
    command = [sys.executable, saying.__file__, store.tracking_uri, str(tmp_path / "outputs"), "10"]
    subprocess.run(command, check=True, timeout=300)
    (experiment,) = [found for found in store.search_experiments() if found.name == "mine"]
    runs = store.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 10
    for run in runs:
        assert_holds_metrics(store, run.info.run_id, steps=200)
