"""What a whole training leaves in its output folder and in MLflow."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import joblib
import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from training import SMALL, only_output, only_run, train

from mlflow_ssl.config import build, compose_config, resolve
from mlflow_ssl.machine import settle
from mlflow_ssl.tracking.params import flatten

# whole trainings earn Lightning's advice on loaders and MLflow's on type hints; warnings are errors in unit tests
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

COUNTS = {"dark": 24, "light": 20, "middle": 22}
LARGER = ("transforms.input_height=32", "transforms.input_width=32")
"""At 16 px the last stage convolves single pixels: for their bfloat16 gradient torch reads unwritten memory on CPUs."""


class Trained:
    """One training, shared by the tests that only look at it."""

    def __init__(self, folder, client):
        self.data = folder
        self.client = client
        self.output = only_output().resolve()
        self.run = only_run(client)
        self.config = yaml.safe_load((self.output / "config_resolved.yaml").read_text())

    def history(self, name):
        return [(point.step, point.value) for point in self.client.get_metric_history(self.run.info.run_id, name)]

    def artifacts(self, folder=None):
        return {info.path for info in self.client.list_artifacts(self.run.info.run_id, folder)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, migrated_store):
    import shutil

    from conftest import write_images

    here = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        shutil.copy(migrated_store, here / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'mlflow.db'}")
        folder = write_images(here / "my images", COUNTS, size=20)
        # every export, a step of two batches, and a list that MLflow has to show whole
        words = ["export.types=[torchscript,onnx,pytorch,safetensors]", "datamodule.batch_size=4"]
        assert train(folder, "trainer.accumulate_grad_batches=2", *words) == 0
        yield Trained(folder, MlflowClient())


def backbone_of(trained):
    """Return the network of the best checkpoint, built from the run's own config."""
    config = resolve(compose_config([*SMALL, "data_path=/nowhere", "model.channels_last=false"]))
    method = build(config.model)
    method.load_state_dict(torch.load(trained.output / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"])
    return method.online.backbone.eval()


def test_the_run_is_finished_and_named(trained):
    assert trained.run.info.status == "FINISHED"
    assert trained.run.info.run_name.startswith("run-test_resnet-")
    assert trained.client.get_experiment(trained.run.info.experiment_id).name == "byol"


def test_the_output_folder_holds_the_tutorials_entries(trained):
    names = {path.name for path in trained.output.iterdir()}
    assert {"checkpoints", "config_resolved.yaml", "config_tree.txt", "data", "deployment_model", "main.log"} <= names
    assert {path.name for path in (trained.output / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_mlflow_holds_what_the_output_folder_holds(trained):
    assert trained.artifacts() >= {"checkpoints", "config", "data", "deployment_model", "main.log"}
    assert trained.artifacts("checkpoints") == {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    names = ("index.parquet", "splits.csv", "datamodule.joblib", "bad_images.csv")
    assert {f"data/{name}" for name in names} == trained.artifacts("data")
    named = {"config_resolved.yaml", "config_tree.txt", "config_unresolved.yaml", "overrides.yaml", "packages.txt"}
    assert {f"config/{name}" for name in named} == trained.artifacts("config")


def test_every_leaf_of_the_resolved_config_is_a_parameter(trained):
    assert dict(flatten(trained.config)) == trained.run.data.params
    assert trained.run.data.params["trainer.accumulate_grad_batches"] == "2"


def test_val_acc_begins_with_the_untrained_network_and_counts_optimizer_steps(trained):
    # 44 training images in batches of 4, two of which make a step: 6 steps an epoch
    images = len(
        [line for line in (trained.output / "data" / "splits.csv").read_text().splitlines() if '"train"' in line]
    )
    steps = 2 * -(-(images // 4 + (images % 4 > 1)) // 2)
    assert [step for step, _ in trained.history("val_acc")] == [0, steps]
    assert [step for step, _ in trained.history("val_acc_weighted")] == [0, steps]
    assert [step for step, _ in trained.history("train/loss")] == list(range(1, steps + 1))


def test_the_last_checkpoint_is_the_end_of_the_training_also_between_validations(store, image_folder):
    words = ["trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", "datamodule.val_size=0"]
    assert train(image_folder({"a": 20, "b": 20}), *words) == 0
    checkpoint = torch.load(only_output() / "checkpoints" / "last.ckpt", weights_only=True)
    final = max(point.step for point in store.get_metric_history(only_run(store).info.run_id, "train/loss"))
    assert checkpoint["global_step"] == final > 3


def test_every_promised_metric_is_logged(trained):
    promised = {"train/loss", "train/lr", "train/tau", "train/images_per_second", "test_acc", "test_acc_weighted"}
    promised |= {"test_acc_linear", "baseline_acc_pixels", "data/bad_images", "epoch"}
    assert promised <= trained.run.data.metrics.keys()


def test_tau_rises_from_its_base_to_one(trained):
    taus = [value for _, value in trained.history("train/tau")]
    assert taus[0] == pytest.approx(trained.config["model"]["base_tau"])
    assert taus == sorted(taus)
    assert taus[-1] < 1


def test_code_and_packages_are_on_record(trained):
    tags = trained.run.data.tags
    assert tags["version.torch"] == version("torch")
    assert len(tags["data.digest"]) == 32
    assert "torch==" in (trained.output / "packages.txt").read_text()


def test_each_split_is_an_input_of_the_run(trained):
    used = {entry.tags[0].value: entry.dataset for entry in trained.run.inputs.dataset_inputs}
    assert set(used) == {"train", "val", "test"}
    assert {dataset.name for dataset in used.values()} == {"my images"}
    counts = {split: json.loads(dataset.profile)["num_images"] for split, dataset in used.items()}
    lines = (trained.output / "data" / "splits.csv").read_text().splitlines()
    assert counts == {split: sum(f'"{split}"' in line for line in lines) for split in used}


def test_the_joblib_loads_back_with_the_same_splits_in_another_place(trained, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(trained.data)
    datamodule = joblib.load(trained.output / "data" / "datamodule.joblib")
    assert not [path for path in datamodule.index.paths if path.startswith("/")]
    datamodule.data_path = str(moved)
    datamodule.setup()
    lines = (trained.output / "data" / "splits.csv").read_text().splitlines()
    assert len(lines) == len(datamodule.index) + 1
    (view_1, view_2), labels = next(iter(datamodule.train_dataloader()))
    assert view_1.shape == view_2.shape == (4, 3, 16, 16)
    assert set(labels.tolist()) <= {0, 1, 2}


def test_the_registered_network_loads_by_name_and_is_the_best_checkpoints(trained):
    network = mlflow.pytorch.load_model("models:/byol/latest")
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        expected = backbone_of(trained)((images - 0.5) / 0.5)
        got = network(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_registered_model_predicts_as_pyfunc(trained):
    model = mlflow.pyfunc.load_model("models:/byol/latest")
    images = np.random.default_rng(0).random((3, 3, 16, 16), dtype=np.float32)
    with torch.no_grad():
        expected = backbone_of(trained)((torch.from_numpy(images) - 0.5) / 0.5).numpy()
    np.testing.assert_allclose(model.predict(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("trained")
def test_the_readmes_code_loads_the_network():
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["embeddings"].shape == (4, 96)


def test_the_version_says_how_good_it_is_and_on_which_data(trained):
    registered = trained.client.get_model_version("byol", "1")
    assert float(registered.tags["val_acc"]) == pytest.approx(max(value for _, value in trained.history("val_acc")[1:]))
    assert float(registered.tags["test_acc"]) == pytest.approx(trained.run.data.metrics["test_acc"])
    assert registered.tags["data.digest"] == trained.run.data.tags["data.digest"]
    assert registered.run_id == trained.run.info.run_id


def test_the_registered_model_has_signature_example_and_public_pins(trained):
    info = mlflow.models.get_model_info("models:/byol/1")
    assert [param.name for param in info.signature.params] == ["neighbours"]
    assert info.signature.inputs is not None
    assert set(info.flavors) == {"pytorch", "python_function"}
    assert info.saved_input_example_info is not None
    pins = Path(mlflow.artifacts.download_artifacts("models:/byol/1/requirements.txt")).read_text().split()
    assert any(pin.startswith("torch==") for pin in pins)
    assert not [pin for pin in pins if "+" in pin]


def test_the_model_card_says_what_a_caller_needs(trained):
    card = json.loads((trained.output / "deployment_model" / "model.json").read_text())
    assert card["input_size"] == [16, 16]
    assert (card["channel_order"], card["input_range"]) == ("RGB", [0.0, 1.0])
    assert (card["mean"], card["std"]) == ([0.5] * 3, [0.5] * 3)
    assert (card["embedding_size"], card["classes"]) == (96, ["dark", "light", "middle"])


def test_the_exported_state_dict_goes_back_into_timm(trained):
    import timm
    from safetensors.torch import load_file

    card = json.loads((trained.output / "deployment_model" / "model.json").read_text())
    assert card["state_dict_fits"].startswith('timm.create_model("test_resnet"')
    network = timm.create_model("test_resnet", num_classes=0)
    network.load_state_dict(torch.load(trained.output / "deployment_model" / "model.pth", weights_only=True))
    network.load_state_dict(load_file(trained.output / "deployment_model" / "model.safetensors"))


def test_the_next_training_can_start_from_the_registered_network(trained):
    config = resolve(compose_config([*SMALL, "data_path=/nowhere", "backbone.checkpoint_path=models:/byol/1"]))
    settle(config)
    started = build(config.model).online.backbone.state_dict()
    for name, value in backbone_of(trained).state_dict().items():
        torch.testing.assert_close(started[name], value)


def test_the_end_of_the_log_says_where_to_look_and_how_to_load(trained):
    log = mlflow.artifacts.load_text(f"runs:/{trained.run.info.run_id}/main.log")
    assert log in (trained.output / "main.log").read_text()
    assert f"/#/experiments/{trained.run.info.experiment_id}/runs/{trained.run.info.run_id}" in log
    assert 'network = mlflow.pytorch.load_model("models:/byol/1")' in log
    assert "(untrained) -> " in log


def losses(client):
    run = only_run(client)
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_seed_gives_the_same_losses_whatever_the_workers(store, image_folder, trained_losses, workers):
    folder = image_folder({"a": 20, "b": 20})
    assert train(folder, f"datamodule.num_workers={workers}") == 0
    assert losses(store) == trained_losses.setdefault("losses", losses(store))


@pytest.fixture(scope="module")
def trained_losses():
    """Remember the losses of the first run for the runs after it."""
    return {}


def test_another_seed_gives_other_losses(store, image_folder, trained_losses):
    assert train(image_folder({"a": 20, "b": 20}), "core.seed=7") == 0
    assert losses(store) != trained_losses["losses"]


@pytest.mark.parametrize("counts", [{".": 30}, {"only": 30}], ids=["flat", "one class"])
def test_images_of_one_kind_train_without_val_acc(store, image_folder, counts):
    assert train(image_folder(counts)) == 0
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert not [name for name in run.data.metrics if "acc" in name]
    assert run.data.metrics["embedding/rankme"] >= 1
    assert {path.name for path in (only_output() / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert "no val_acc in this run" in (only_output() / "main.log").read_text()
    assert store.get_model_version("byol", "1").tags["data.digest"]


@pytest.mark.parametrize(
    ("words", "there", "missing"),
    [
        (["datamodule.val_size=0"], "test_acc", "val_acc"),
        (["datamodule.test_size=0"], "val_acc", "test_acc"),
    ],
)
def test_an_empty_split_is_left_out(store, image_folder, words, there, missing):
    assert train(image_folder({"a": 20, "b": 20}), *words) == 0
    metrics = only_run(store).data.metrics
    assert there in metrics
    assert missing not in metrics


def test_skipped_images_are_listed_and_counted(store, image_folder):
    folder = image_folder({"a": 20, "b": 20})
    (folder / "a" / "broken.png").write_bytes(b"not a picture")
    assert train(folder, "datamodule.on_bad_image=skip") == 0
    assert only_run(store).data.metrics["data/bad_images"] == 1
    assert (
        "a/broken.png,is no image of a format that is read" in (only_output() / "data" / "bad_images.csv").read_text()
    )


def test_a_last_batch_of_one_image_trains(store, image_folder):
    # 17 images a class, all to training: 34 = 3 * 11 + 1
    words = ["datamodule.val_size=0", "datamodule.test_size=0", "datamodule.batch_size=11"]
    assert train(image_folder({"a": 17, "b": 17}), *words) == 0


def test_no_more_epochs_than_warm_up_epochs_trains(store, image_folder):
    assert train(image_folder({"a": 20, "b": 20}), "scheduler.warmup_epochs=2") == 0


def test_a_version_knows_its_val_acc_whatever_it_was_chosen_by(store, image_folder):
    words = ["callbacks.model_checkpoint.monitor=train/loss", "callbacks.model_checkpoint.mode=min"]
    assert train(image_folder({"a": 20, "b": 20}), *words, "trainer.check_val_every_n_epoch=1") == 0
    curve = store.get_metric_history(only_run(store).info.run_id, "val_acc")
    found = float(store.get_model_version("byol", "1").tags["val_acc"])
    assert any(found == pytest.approx(point.value, abs=1e-5) for point in curve[1:])


def test_bf16_training_gives_float32_metrics_and_export(store, image_folder):
    assert train(image_folder({"a": 20, "b": 20}), "trainer.precision=bf16-mixed", *LARGER) == 0
    network = mlflow.pytorch.load_model("models:/byol/1")
    assert network(torch.rand(2, 3, 16, 16)).dtype == torch.float32


def test_two_processes_train_into_one_run_and_one_version(store, image_folder):
    words = [*SMALL, f"data_path={image_folder({'a': 20, 'b': 20})}", "trainer.devices=2", "trainer.strategy=ddp"]
    subprocess.run([sys.executable, "-m", "mlflow_ssl", *words], check=True, timeout=300)
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert [version.version for version in store.search_model_versions("name='byol'")] == [1]
    # 24 to 28 training images in batches of 8 over two processes
    assert [point.step for point in store.get_metric_history(run.info.run_id, "val_acc")] == [0, 4]
    assert {path.name for path in (only_output() / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_what_auto_chose_is_named_in_the_log(store, image_folder):
    words = ["trainer=auto", "trainer.precision=auto", "trainer.limit_train_batches=1", *LARGER]
    assert train(image_folder({"a": 20, "b": 20}), *words) == 0
    assert "trainer on this machine: " in (only_output() / "main.log").read_text()
    assert only_run(store).data.params["trainer.precision"] in {"bf16-mixed", "16-mixed", "32-true"}


def test_other_data_than_the_demonstrations_are_told_what_was_made_for_it(store, image_folder):
    assert train(image_folder({"a": 20, "b": 20})) == 0
    log = (only_output() / "main.log").read_text()
    assert "these settings were made for them: backbone, transforms" in log
    assert "experiment=base/ssl/byol" in log
