"""Whole trainings whose server dies, or whose disk is full."""

import json
import resource
import threading
from pathlib import Path

import mlflow
import pytest
import torch
from servers import running_server, wait_until
from training import only_output, train

from mlflow_ssl.cli import main

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]

EPOCHS = 10


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory, migrated_store):
    with running_server(tmp_path_factory.mktemp("server"), migrated_store) as server:
        yield server


@pytest.fixture
def server(shared_server, tmp_path, monkeypatch):
    """A running server, which the test may kill, and an empty current folder."""
    if shared_server.down:
        shared_server.start()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield shared_server
    mlflow.set_tracking_uri(None)


def losses():
    """Return the steps whose loss has been said."""
    entries = []
    for file in Path("outputs").rglob("records.jsonl"):
        entries += [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
    metrics = [metric for entry in entries for metric in entry.get("metrics", ())]
    return [step for key, _, _, step in metrics if key == "train/loss"]


class Midway(threading.Thread):
    """Does something once a training has come to its third step.

    Args:
        do: what to do.

    Attributes:
        steps: how many steps were done by then.
    """

    def __init__(self, do):
        super().__init__(daemon=True)
        self._do = do
        self.steps = 0

    def run(self):
        """Wait, and do it."""
        wait_until(lambda: len(losses()) >= 3, "the training trains")
        self._do()
        self.steps = len(losses())


def words(server, folder, name):
    return [
        f"tracking.uri={server.uri}",
        f"core.name={name}",
        f"trainer.max_epochs={EPOCHS}",
        "callbacks.last_checkpoint.every_seconds=0",
        f"registry.name={name}",
    ]


def the_run(server, name):
    experiment = server.client.get_experiment_by_name(name)
    (run,) = server.client.search_runs([experiment.experiment_id])
    return run


def assert_whole(server, name):
    """Assert that MLflow holds all of a finished training."""
    run = the_run(server, name)
    assert run.info.status == "FINISHED"
    steps = [point.step for point in server.client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == sorted(losses())
    assert sorted(steps) == list(range(1, len(steps) + 1))
    assert len(steps) % EPOCHS == 0
    (version,) = server.client.search_model_versions(f"name='{name}'")
    assert version.run_id == run.info.run_id
    names = {info.path for info in server.client.list_artifacts(run.info.run_id)}
    assert {"checkpoints", "config", "data", "deployment_model", "images", "main.log"} <= names
    kept = {Path(info.path).name for info in server.client.list_artifacts(run.info.run_id, "checkpoints")}
    assert {"best.ckpt", "last.ckpt"} <= kept


def test_a_server_that_is_killed_and_returns_gets_the_whole_training(server, image_folder):
    def restart():
        server.kill()
        threading.Timer(5, server.start).start()

    midway = Midway(restart)
    midway.start()
    folder = image_folder({"a": 20, "b": 20})
    assert train(folder, *words(server, folder, "returns")) == 0
    assert midway.steps < len(losses())
    assert_whole(server, "returns")


def test_a_server_that_never_returns_gets_the_whole_training_by_sync(server, image_folder, capsys):
    midway = Midway(server.kill)
    midway.start()
    folder = image_folder({"a": 20, "b": 20})
    assert train(folder, *words(server, folder, "never"), "tracking.wait_at_end_seconds=1") == 3
    assert midway.steps < len(losses())
    output = only_output().resolve()
    assert f"python -m mlflow_ssl sync {output}" in capsys.readouterr().err
    server.start()
    assert the_run(server, "never").info.status == "RUNNING"
    assert main(["sync", str(output)]) == 0
    assert_whole(server, "never")


def test_a_full_disk_ends_the_run_failed_and_leaves_the_former_checkpoint(server, image_folder, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk():
        wait_until(lambda: list(Path("outputs").rglob("last.ckpt")), "there is a checkpoint")
        (checkpoint,) = Path("outputs").rglob("last.ckpt")
        resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint.stat().st_size // 2, hard))

    Midway(fill_disk).start()
    folder = image_folder({"a": 20, "b": 20})
    try:
        assert train(folder, *words(server, folder, "full"), "trainer.max_epochs=1000") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints = only_output().resolve() / "checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] >= 1
    assert not list(checkpoints.glob("*.part"))
    run = the_run(server, "full")
    assert run.info.status == "FAILED"
    reason = run.data.tags["mlflow_ssl.reason"]
    assert reason.startswith(f"the checkpoint {checkpoints}")
    assert "the former one is as it was" in reason
    printed = capsys.readouterr().err
    assert len([line for line in printed.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in printed
