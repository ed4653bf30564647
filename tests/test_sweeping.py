"""A sweep of real trainings: one fails, one is killed, the rest finish, and what is missing is run later."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_sweep import found, states, table
from training import SMALL

from mlflow_ssl.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def kill_when_it_trains(number):
    """Send SIGKILL to a training of the sweep once it has a checkpoint."""

    def watch():
        end = time.monotonic() + 300
        while time.monotonic() < end:
            for checkpoint in Path("outputs").rglob(f"children/{number:03d}/checkpoints/last.ckpt"):
                folder = str(checkpoint.parents[1])
                for entry in Path("/proc").glob("[0-9]*/cmdline"):
                    if folder.encode() in entry.read_bytes():
                        os.kill(int(entry.parent.name), signal.SIGKILL)
                        return
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()


def test_the_best_of_a_grid_is_registered_and_resuming_runs_what_is_missing(store, image_folder, tmp_path):
    folder = image_folder({"dark": 24, "light": 20, "middle": 22}, size=20)
    words = [*SMALL, f"data_path={folder}", "trainer.max_epochs=3", "callbacks.pictures=null"]
    words += ["trainer.check_val_every_n_epoch=1", "callbacks.last_checkpoint.every_seconds=0"]
    kill_when_it_trains(1)
    assert main([*words, "-m", "datamodule.batch_size=8,9999", "optimizer.lr=1e-3,1e-2", "sweep.jobs=2"]) == 0
    parent, children = found(store)
    assert parent.info.status == "FINISHED"
    assert states(children) == ["finished", "killed", "failed", "failed"]
    assert [children[number].info.status for number in range(4)] == ["FINISHED", "KILLED", "FAILED", "FAILED"]
    rows = table(store, parent, tmp_path)
    assert "datamodule.batch_size must be at most the training split's" in rows[2]["reason"]
    (version,) = store.search_model_versions("name = 'byol'")
    assert version.run_id == children[0].info.run_id == parent.data.tags["sweep.best_run"]
    assert 'load_model("models:/byol/1")' in children[0].data.tags["mlflow.note.content"]
    assert 'load_model("models:/byol/1")' in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["test_acc"] == children[0].data.metrics["test_acc"]
    begun = children[1].data.metrics

    assert main([f"resume={parent.info.run_id}", "callbacks.last_checkpoint.every_seconds=60"]) == 0
    again, resumed = found(store)
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    assert states(resumed) == ["finished", "finished", "failed", "failed"]
    assert [resumed[number].info.end_time for number in (0, 2, 3)] == [
        children[number].info.end_time for number in (0, 2, 3)
    ]
    steps = [point.step for point in store.get_metric_history(resumed[1].info.run_id, "train/loss")]
    assert steps == list(range(1, len(steps) + 1))  # it went on, in the same run
    assert begun.keys() <= resumed[1].data.metrics.keys()
    best = max((0, 1), key=lambda number: float(table(store, again, tmp_path / "again")[number]["val_acc"]))
    assert again.data.tags["sweep.best_run"] == resumed[best].info.run_id
    assert again.data.metrics["test_acc"] == resumed[best].data.metrics["test_acc"]
    versions = {version.run_id for version in store.search_model_versions("name = 'byol'")}
    assert versions == {children[0].info.run_id, resumed[best].info.run_id}
