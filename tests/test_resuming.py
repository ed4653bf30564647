"""A training that is stopped, however it is stopped, goes on as if it had not been: in the same run."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_images
from mlflow import MlflowClient
from training import SMALL, only_output, only_run

from mlflow_ssl.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

STEPS_PER_EPOCH, EPOCHS = 6, 5
WORDS = (
    *SMALL,
    f"trainer.max_epochs={EPOCHS}",
    "trainer.check_val_every_n_epoch=2",
    "callbacks.pictures=null",
    "callbacks.last_checkpoint.every_seconds=0",
)
TIMED = {"train/images_per_second", "train/data_wait_share"}
"""Metrics of the clock, the same in no two runs."""


class Project:
    """A current folder with images, a tracking store and the runs in it."""

    def __init__(self, folder, migrated_store, patch):
        patch.chdir(folder)  # first: where a store is opened, its artifacts stay
        shutil.copy(migrated_store, folder / "mlflow.db")
        self.data = write_images(folder / "images", {"dark": 24, "light": 20, "middle": 22}, size=20)
        self.words = [*WORDS, f"data_path={self.data}"]
        self.client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("MLFLOW_TRACKING_URI", self.client.tracking_uri)

    @property
    def run(self):
        return only_run(self.client)

    def metrics(self):
        """Return every metric as steps and values, in the order of the history."""
        run = self.run
        names = set(run.data.metrics)
        histories = {name: self.client.get_metric_history(run.info.run_id, name) for name in names}
        return {name: [(point.step, point.value) for point in history] for name, history in histories.items()}

    def weights(self):
        return torch.load(only_output() / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture
def project(tmp_path, migrated_store, monkeypatch):
    return Project(tmp_path, migrated_store, monkeypatch)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, migrated_store):
    """Return metrics and last checkpoint of a training that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        project = Project(tmp_path_factory.mktemp("uninterrupted"), migrated_store, patch)
        assert main(project.words) == 0
        return project.metrics(), project.weights()


def assert_as_if_never_stopped(project, uninterrupted):
    metrics, checkpoint = uninterrupted
    resumed = project.metrics()
    assert project.run.info.status == "FINISHED"
    assert resumed.keys() == metrics.keys()
    for name, history in metrics.items():
        assert [step for step, _ in resumed[name]] == [step for step, _ in history], name
        if name not in TIMED:
            assert resumed[name] == history, name
    last = project.weights()
    assert last["global_step"] == checkpoint["global_step"] == EPOCHS * STEPS_PER_EPOCH
    for name in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(last[name], checkpoint[name], rtol=0, atol=0)


def stop_at(step, number=signal.SIGTERM):
    """Send this process a signal once a step is logged."""
    from killed import logged_step

    def watch():
        end = time.monotonic() + 120
        while logged_step() < step and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def test_killed_twenty_times_it_ends_as_if_never_stopped(project, uninterrupted):
    kills = [sys.executable, str(Path(__file__).with_name("killed.py")), "20", "0", str(EPOCHS * STEPS_PER_EPOCH)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*kills, *project.words], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_as_if_never_stopped(project, uninterrupted)


def test_sigterm_saves_uploads_and_says_how_to_go_on(project, uninterrupted):
    stop_at(7)
    assert main(project.words) == 143
    stopped = project.run
    assert stopped.info.status == "KILLED"
    assert stopped.data.tags["mlflow_ssl.reason"] == "stopped by SIGTERM"
    assert f"mlflow run . -P resume={stopped.info.run_id}" in stopped.data.tags["mlflow.note.content"]
    saved = project.weights()["global_step"]
    assert 7 <= saved < EPOCHS * STEPS_PER_EPOCH
    # every step that was taken is logged, and the last one is in the checkpoint
    assert [step for step, _ in project.metrics()["train/loss"]] == list(range(1, saved + 1))
    uploaded = {info.path for info in project.client.list_artifacts(stopped.info.run_id, "checkpoints")}
    assert "checkpoints/last.ckpt" in uploaded

    assert main([*project.words, "resume=last"]) == 0
    assert project.run.info.run_id == stopped.info.run_id
    assert_as_if_never_stopped(project, uninterrupted)


def test_a_lost_machine_is_resumed_from_the_artifacts(project, uninterrupted, monkeypatch, tmp_path):
    stop_at(12)
    assert main(project.words) == 143
    run_id = project.run.info.run_id
    shutil.rmtree("outputs")
    elsewhere = tmp_path / "another machine"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    moved = shutil.move(project.data, elsewhere / "my images")
    assert main([f"resume={run_id}", f"data_path='{moved}'", "datamodule.num_workers=1"]) == 0
    assert project.run.info.run_id == run_id
    assert only_output().resolve().is_relative_to(elsewhere)
    assert_as_if_never_stopped(project, uninterrupted)


def test_a_run_goes_on_with_more_processes(project):
    stop_at(9)
    assert main(project.words) == 143
    words = ["resume=last", "trainer.devices=2", "trainer.strategy=ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "mlflow_ssl", *project.words, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert project.run.info.status == "FINISHED"
    steps = [step for step, _ in project.metrics()["train/loss"]]
    assert steps == list(range(1, steps[-1] + 1))
    # batches of two processes: half as many steps for each epoch that is left
    assert 9 < steps[-1] < EPOCHS * STEPS_PER_EPOCH


REFUSED = {
    "optimizer.lr=0.1": "the run's optimizer.lr must stay",
    "datamodule.batch_size=4": "the run's datamodule.batch_size must stay: it is 8, asked for 4",
    "backbone=resnet50": "the run's backbone must stay",
    "core.seed=7": "the run's core.seed must stay: it is 42, asked for 7",
    "+new.key=1": "the run's new.key must stay",
    "~callbacks.knn": "the run's callbacks.knn must stay",
}


def test_what_would_change_the_training_is_refused_by_name(project, capsys):
    stop_at(3)
    assert main(project.words) == 143
    run = project.run
    for word, message in REFUSED.items():
        capsys.readouterr()
        assert main([*project.words, "resume=last", word]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")

    changed = project.data / "dark" / "000.png"
    shutil.copy(project.data / "light" / "000.png", changed)
    assert main([*project.words, f"resume={run.info.run_id}"]) == 2
    assert "the data have changed since run" in capsys.readouterr().err
    assert project.run.info.status == "KILLED"

    assert main([*project.words, "resume=last", "resume_changed_data=true"]) == 0
    finished = project.run
    assert finished.info.status == "FINISHED"
    assert finished.data.tags["data.digest"] != run.data.tags["data.digest"]

    assert main([*project.words, "resume=last"]) == 2
    assert f"is finished after {EPOCHS} epochs" in capsys.readouterr().err


def test_a_run_that_goes_on_elsewhere_is_not_resumed_at_once(project, capsys):
    stop_at(3)
    assert main(project.words) == 143
    from mlflow_ssl.tracking.run import lock_output

    lock = lock_output(only_output().resolve())
    try:
        assert main([*project.words, "resume=last"]) == 2
    finally:
        lock.release()
    assert "another process is writing to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("last", "there is no run to resume in experiment 'byol'"), ("0" * 32, "there is no run 000")],
)
def test_a_run_that_is_not_there_is_one_line(project, capsys, wanted, message):
    assert main([f"resume={wanted}"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_reproduction_is_a_run_of_its_own_that_ends_the_same(project, uninterrupted, capsys):
    assert main(project.words) == 0
    first = project.run
    pins = only_output() / "packages.txt"
    pins.write_text(pins.read_text().replace(f"torch=={version('torch')}", "torch==0.0.1"))
    assert main(["reproduce", "--run_id", first.info.run_id]) == 0
    printed = capsys.readouterr().err
    assert f"package torch: 0.0.1 then, {version('torch')} now" in printed
    assert "val_acc then" in printed
    (second,) = [run for run in all_runs(project.client) if run.info.run_id != first.info.run_id]
    assert second.info.status == "FINISHED"
    assert second.data.tags["reproduces"] == first.info.run_id
    assert second.data.metrics["reproduce/largest_val_acc_difference"] == 0
    assert second.data.metrics["test_acc"] == first.data.metrics["test_acc"]
    assert project.client.get_model_version("byol", "2").run_id == second.info.run_id


def test_a_stored_config_builds_nothing_that_is_not_known(project, capsys, tmp_path):
    stop_at(3)
    assert main(project.words) == 143
    run = project.run
    config = yaml.safe_load((only_output() / "config_resolved.yaml").read_text())
    config["callbacks"]["progress"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'executed'}"}
    tampered = tmp_path / "config_resolved.yaml"
    tampered.write_text(yaml.safe_dump(config))
    project.client.log_artifact(run.info.run_id, str(tampered), "config")
    shutil.rmtree("outputs")
    for words in (["resume=last"], ["reproduce", "--run_id", run.info.run_id]):
        assert main(words) == 2
        assert "builds os.system (at callbacks.progress)" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def all_runs(client):
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
