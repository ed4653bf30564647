"""A registered network becomes a classifier, by the command that users give."""

import base64
import json
import os
import signal
import threading
import time
from pathlib import Path

import mlflow
import pytest
import timm
import torch
from killed import logged_step
from packages import package, trained_here
from safetensors.torch import load_file

from mlflow_ssl.cli import main
from mlflow_ssl.tracking.embedder import open_embedder
from mlflow_ssl.tracking.registry import register_package

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

COUNTS = {"dark": 24, "light": 20, "middle": 22}
EPOCHS, FROZEN = 4, 2
WORDS = (
    "finetune",
    "model_uri=models:/tiny@champion",
    "trainer=lightning_cpu",
    "trainer.precision=32-true",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.log_every_n_steps=1",
    "optimizer.lr=0.01",
    f"model.freeze_epochs={FROZEN}",
    "datamodule.num_workers=0",
    "datamodule.batch_size=8",
    "callbacks.last_checkpoint.every_seconds=0",
    "tracking.system_metrics=false",
    "export.types=[torchscript,safetensors]",
)
TIMED = {"train/images_per_second", "train/data_wait_share"}


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    network = trained_here(small_stem=False)
    norms = [module for module in network.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the statistics become those of one batch, as if it had been trained on such images
    brightness = torch.linspace(0, 0.6, 32).view(-1, 1, 1, 1)
    images = brightness + 0.4 * torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.backbone.train()((images - network.mean) / network.std)
    for norm in norms:
        norm.momentum = 0.1
    network.eval()
    return package(tmp_path_factory.mktemp("packaged") / "package", network)


@pytest.fixture
def source(store, packaged):
    """Register the network that is finetuned, and return the id of its logged model."""
    run_id = store.create_run(store.create_experiment("training")).info.run_id
    register_package(store, run_id, packaged)
    return store.get_run(run_id).outputs.model_outputs[0].model_id


def finetuned(store):
    """Return the one run, its output folder, and its metrics as steps and values."""
    (found,) = store.search_runs([store.get_experiment_by_name("finetune").experiment_id])
    run = store.get_run(found.info.run_id)
    histories = {name: store.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    metrics = {name: [(point.step, point.value) for point in history] for name, history in histories.items()}
    return run, Path(run.data.tags["mlflow_ssl.output_dir"]), metrics


def stop_at(step):
    """Send this process SIGTERM once a step is logged."""

    def watch():
        end = time.monotonic() + 120
        while logged_step() < step and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def test_a_classifier_is_trained_registered_and_answers_with_class_names(store, source, image_folder):
    folder = image_folder(COUNTS, size=20)
    assert main([*WORDS, f"data_path={folder}", "loss.class_weights=balanced"]) == 0
    run, output, metrics = finetuned(store)
    assert run.info.status == "FINISHED"
    assert [model.model_id for model in run.inputs.model_inputs] == [source]
    assert {entry.tags[0].value for entry in run.inputs.dataset_inputs} == {"train", "val", "test"}
    params = run.data.params
    assert (params["model_uri"], params["backbone.checkpoint_path"]) == ("models:/tiny@champion", "models:/tiny/1")
    assert (params["model.num_classes"], len(json.loads(params["loss.class_weights"]))) == ("3", 3)
    assert metrics.keys() >= {"baseline_acc_knn", "baseline_acc_linear", "val_f1", "val_loss", "test_acc", "test_f1"}
    assert [step for step, _ in metrics["val_acc"]] == [epoch * 5 for epoch in range(EPOCHS + 1)]
    assert metrics["val_acc"][-1][1] > metrics["val_acc"][0][1]
    files = {info.path for info in store.list_artifacts(run.info.run_id, "evaluation")}
    assert files >= {"evaluation/confusion_matrix.png", "evaluation/classes.csv", "evaluation/worst_confused.html"}

    version = store.get_model_version_by_alias("tiny_classifier", "champion")
    assert version.tags["source_model"] == "models:/tiny/1"
    assert float(version.tags["test_acc"]) == pytest.approx(run.data.metrics["test_acc"])
    images = [file.read_bytes() for file in sorted(folder.glob("*/000.png"))]
    rows = mlflow.pyfunc.load_model("models:/tiny_classifier@champion").predict(
        [base64.b64encode(image).decode() for image in images], params={"top_k": 2}
    )
    assert {row["label"] for row in rows} <= COUNTS.keys()
    assert all(row["top"][0]["probability"] == row["probability"] >= row["top"][1]["probability"] for row in rows)

    card = json.loads((output / "deployment_model" / "model.json").read_text())
    assert (card["output"], card["classes"]) == ("logits", sorted(COUNTS))
    assert card["state_dict_fits"] == 'timm.create_model("resnet10t", num_classes=3)'
    network = timm.create_model("resnet10t", num_classes=3).eval()
    network.load_state_dict(load_file(output / "deployment_model" / "model.safetensors"))
    scripted = mlflow.pytorch.load_model("models:/tiny_classifier/1")
    batch = torch.rand(5, 3, 32, 32)
    mean, std = (torch.tensor(card[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(scripted(batch), network((batch - mean) / std), rtol=1e-4, atol=1e-5)
        # what embeds takes its backbone
        embedder = open_embedder("models:/tiny_classifier/1", device="cpu")
        expected = network.forward_head(network.forward_features(batch), pre_logits=True)
        torch.testing.assert_close(embedder.embed(batch), expected, rtol=1e-4, atol=1e-5)


def test_stopped_while_frozen_it_goes_on_and_ends_as_if_never_stopped(store, source, image_folder, monkeypatch):
    words = [*WORDS, f"data_path={image_folder(COUNTS, size=20)}"]
    ends = []
    for name, stopped in (("whole", False), ("stopped", True)):
        here = [*words, f"core.name={name}"]
        if stopped:
            stop_at(2 * len(ends[0][0]["train/loss"]) // EPOCHS - 3)  # an epoch of 5 steps; it is frozen for two
            assert main(here) == 143
            experiment = store.get_experiment_by_name(name).experiment_id
            (run,) = store.search_runs([experiment])
            assert run.info.status == "KILLED"
            # without a word of finetuning: the run knows
            assert main([f"resume={run.info.run_id}"]) == 0
        else:
            assert main(here) == 0
        (run,) = store.search_runs([store.get_experiment_by_name(name).experiment_id])
        histories = {key: store.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        metrics = {key: [(p.step, p.value) for p in each] for key, each in histories.items() if key not in TIMED}
        output = Path(run.data.tags["mlflow_ssl.output_dir"])
        ends.append((metrics, torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)))
        # the next one's journal is to be the only one that is looked at
        monkeypatch.chdir(Path.cwd() if stopped else _fresh(Path.cwd()))
    (metrics, checkpoint), (resumed, last) = ends
    assert resumed == metrics
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(last[key], checkpoint[key], rtol=0, atol=0)


def _fresh(folder):
    fresh = folder / "elsewhere"
    fresh.mkdir()
    return fresh


def test_mistakes_are_one_line_and_leave_no_run(store, source, image_folder, capsys):
    one = image_folder({"only": 20}, name="one")
    for words, message in (
        (["finetune", f"data_path={one}"], "model_uri must be given; add model_uri=VALUE"),
        ([*WORDS, "model_uri=models:/none/1", f"data_path={one}"], "there is no model at models:/none/1"),
        ([*WORDS, f"data_path={one}"], "must hold training images of at least two classes, got 1 (only)"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert message in line
    assert store.get_experiment_by_name("finetune") is None
