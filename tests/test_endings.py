"""How runs end: every mistake is one line, every run is ended, whatever ends it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import SMALL, only_output, only_run, train

from mlflow_ssl.cli import main

pytestmark = pytest.mark.filterwarnings("default")


def write_split(folder, name, *lines):
    (folder / name).write_text("\n".join(lines) + "\n")


def broken(folder):
    (folder / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")


MISTAKES = {
    "an unknown experiment": (["experiment=byoll"], None, "experiment has no option 'byoll'; close matches: byol"),
    "an unknown backbone": (["backbone=resnet19"], None, "backbone has no option 'resnet19'; close matches: resnet18"),
    "an unknown timm name": (["backbone.model_name=resnet19t"], None, "must be a timm model name, got 'resnet19t'"),
    "an unknown key": (["trainer.max_epoch=1"], None, "no config key is named 'trainer.max_epoch'"),
    "a GPU that is not there": (["trainer=lightning_gpu_bf16"], None, "use trainer=lightning_cpu"),
    "too many neighbours": (["callbacks.knn.num_neighbours=99"], None, "num_neighbours must be between 1 and the bank"),
    "too small a bank": (
        ["callbacks.knn.max_bank=2"],
        None,
        "max_bank must be at least callbacks.knn.num_neighbours 3",
    ),
    "too large a batch": (["datamodule.batch_size=99"], None, "datamodule.batch_size must be at most the training"),
    "an unknown export": (["export.types=[tflite]"], None, "export.types.0 is wrong"),
    "a split file that is missing": (
        ["datamodule.train_split_file=no.txt"],
        None,
        "train_split_file must be an existing",
    ),
    "a split that names a missing file": (
        [],
        lambda folder: write_split(folder, "train.txt", "a/000.png", "a/gone.png"),
        "train.txt names a missing file: a/gone.png",
    ),
    "a split that leaves the folder": (
        [],
        lambda folder: write_split(folder, "test.txt", "../secret.png"),
        "test.txt names a file outside the data folder: ../secret.png",
    ),
    "an image in two splits": (
        [],
        lambda folder: [write_split(folder, f"{split}.txt", "a/000.png") for split in ("train", "val")],
        "a/000.png is in train and in val",
    ),
    "an image that cannot be decoded": ([], broken, "a/broken.png"),
    "another normalization": (["transforms.normalize.mean=[0,0,0]"], None, "val_transform must normalize by"),
    "a precision that does not exist": (["trainer.precision=17"], None, "Trainer refuses its arguments"),
    "an occupied output folder": (["core.output_dir=."], None, "core.output_dir must be new or empty"),
    "weights that are not there": (
        ["backbone.checkpoint_path=no.pth"],
        None,
        "checkpoint_path must be an existing file",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_run_running(store, image_folder, capsys, monkeypatch, mistake):
    words, spoil, message = MISTAKES[mistake]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    folder = image_folder({"a": 20, "b": 20})
    if spoil:
        spoil(folder)
    before = set(Path.cwd().iterdir())
    assert train(folder, *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in "".join(lines)
    assert not [run for run in all_runs(store) if run.info.status == "RUNNING"]
    assert {path.name for path in set(Path.cwd().iterdir()) - before} <= {"outputs", "mlruns"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer=lightning_fsdp", "model.compile=true"], "model.compile must be false with trainer=lightning_fsdp"),
        (
            ["trainer=lightning_fsdp", "trainer.precision=16-mixed"],
            "trainer.precision must be one of 32-true, bf16-mixed, bf16-true, 16-true with trainer=lightning_fsdp",
        ),
        (["trainer.sync_batchnorm=perhaps"], "trainer.sync_batchnorm must be true or false, got 'perhaps'"),
        (
            ["trainer.precision=bf16-mixed"],
            "trainer.precision must be 32-true on a CPU for images of 16x16 px, got bf16-mixed: layer4.0.conv1 has",
        ),
    ],
)
def test_a_mistake_in_the_trainers_settings_opens_no_run(store, image_folder, capsys, words, message):
    assert train(image_folder({"a": 20, "b": 20}), "trainer.accelerator=cpu", *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert all_runs(store) == []


def all_runs(client):
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "data_path must be an existing folder"),
        (lambda path: path.mkdir() or path, "found none in"),
        (lambda path: path.mkdir() or ((path / "a.png").write_bytes(b"no") and path), "none can be read"),
    ],
    ids=["missing", "empty", "unreadable"],
)
def test_a_data_folder_without_images_is_named(store, tmp_path, capsys, make, message):
    assert train(make(tmp_path / "data")) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert str(tmp_path / "data") in printed
    assert all_runs(store) == []


def test_a_mistake_ends_the_run_that_the_launcher_opened(store, image_folder, monkeypatch):
    launched = store.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    assert train(image_folder({"a": 20, "b": 20}), "backbone=resnet19") == 2
    run = store.get_run(launched)
    assert run.info.status == "FAILED"
    assert "backbone has no option 'resnet19'" in run.data.tags["mlflow_ssl.reason"]


def test_the_launchers_run_is_taken_over_with_its_parameters(store, image_folder, monkeypatch, caplog):
    launched = store.create_run("0", run_name="as I named it").info.run_id
    store.log_param(launched, "trainer.max_epochs", "'2'")
    store.log_param(launched, "core.tag", "'[x,y]'")
    store.log_param(launched, "core.seed", "7")
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    assert train(image_folder({"a": 20, "b": 20}), "trainer.limit_train_batches=1", "core.tag='[x,y]'") == 0
    run = only_run(store)
    assert (run.info.run_id, run.info.status, run.info.run_name) == (launched, "FINISHED", "as I named it")
    assert run.data.params["trainer.max_epochs"] == "'2'"
    assert run.data.params["datamodule.batch_size"] == "8"
    # only what means something else is worth a word
    warned = [record.message for record in caplog.records if record.message.startswith("parameter ")]
    assert warned == ["parameter core.seed was given as 7 and is 42"]


def test_an_error_ends_the_run_failed_with_its_reason(store, image_folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("mlflow_ssl.export.WRITERS", {"torchscript": ("model.pt", fail)})
    with pytest.raises(RuntimeError, match="the disk is full"):
        train(image_folder({"a": 20, "b": 20}), "trainer.limit_train_batches=1")
    run = only_run(store)
    assert run.info.status == "FAILED"
    assert run.data.tags["mlflow_ssl.reason"] == "RuntimeError: the disk is full"
    assert not (only_output() / "deployment_model").exists()
    assert "the disk is full" in (only_output() / "main.log").read_text()
    assert "main.log" in {info.path for info in store.list_artifacts(run.info.run_id)}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_killed(store, image_folder, number, code):
    words = [*SMALL, f"data_path={image_folder({'a': 40, 'b': 40})}", "trainer.max_epochs=100000"]
    command = [sys.executable, "-m", "mlflow_ssl", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_training(store)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    run = only_run(store)
    assert run.info.status == "KILLED"
    assert run.data.tags["mlflow_ssl.reason"] == f"stopped by {number.name}"
    assert "Traceback" not in errors


def wait_for_training(client, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        runs = all_runs(client)
        if runs and client.get_metric_history(runs[0].info.run_id, "train/loss"):
            return
        time.sleep(0.2)
    raise TimeoutError("no training step was logged")


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_server_that_refuses_is_named(store, image_folder, capsys, monkeypatch):
    uri = f"http://user:secret@127.0.0.1:{closed_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert train(image_folder({"a": 20, "b": 20})) == 2
    printed = capsys.readouterr().err
    assert "the tracking server http://127.0.0.1:" in printed
    assert "does not answer" in printed
    assert "secret" not in printed


def test_a_server_that_never_answers_is_given_up(store, image_folder, capsys, monkeypatch):
    monkeypatch.setattr("mlflow_ssl.tracking.opening.SERVER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert train(image_folder({"a": 20, "b": 20})) == 2
    assert "does not answer (ReadTimeout)" in capsys.readouterr().err


def test_a_silent_server_is_not_asked_to_end_the_launchers_run(store, image_folder, monkeypatch):
    def ask(*_, **__):
        raise AssertionError("MLflow's client tries for minutes")

    monkeypatch.setattr("mlflow_ssl.tracking.lifecycle.MlflowClient", ask)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert train(image_folder({"a": 20, "b": 20})) == 2


def test_pretrained_weights_without_a_network_are_one_line_and_open_no_run(store, image_folder, capsys, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    assert train(image_folder({"a": 20, "b": 20}), "backbone.pretrained=true") == 2
    printed = capsys.readouterr().err
    assert "the weights of test_resnet could not be fetched from the hub" in printed
    assert not store.search_runs([experiment.experiment_id for experiment in store.search_experiments()])


def test_two_runs_of_one_process_do_not_share_a_run(store, image_folder, monkeypatch):
    launched = store.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    folder = image_folder({"a": 20, "b": 20})
    assert train(folder, "trainer.limit_train_batches=1") == 0
    assert "MLFLOW_RUN_ID" not in os.environ
    assert train(folder, "trainer.limit_train_batches=1") == 0
    assert len(all_runs(store)) == 2


def test_main_is_quiet_about_nothing(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mlflow_ssl ")
