"""Weights that processes share are those of one process."""

import os
import subprocess
import sys

import mlflow
import pytest
import sharded_training
import timm
import torch
from scripts import run_script
from sharded_training import OPTIMIZERS, vit_method
from torch import nn
from training import SMALL, only_output, only_run

from mlflow_ssl.cli import main
from mlflow_ssl.sharding import blocks, is_sharded, load_whole, made_whole, without_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")

WORDS = [
    *(word for word in SMALL if not word.startswith(("trainer=", "trainer.precision="))),
    "trainer=lightning_fsdp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "backbone=timm",
    "backbone.model_name=vit_tiny_patch16_224",
    "+backbone.patch_size=8",
    "+backbone.embed_dim=12",
    "+backbone.depth=2",
    "optimizer=lars",
]


# without processes


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("vit_tiny_patch16_224", "Block", 12), ("resnet18", "BasicBlock", 8)]
)
def test_the_blocks_of_a_network_are_those_it_repeats(name, kind, count):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    assert [type(block).__name__ for block in blocks(network)] == [kind] * count


def test_blocks_that_are_in_others_come_first():
    with torch.device("meta"):
        network = timm.create_model("convnext_atto", num_classes=0)
    kinds = [type(block).__name__ for block in blocks(network)]
    assert kinds == ["ConvNeXtBlock"] * 12 + ["ConvNeXtStage"] * 4


def test_a_method_names_all_its_weights():
    method = vit_method()
    named = {id(p) for network in method.networks() for p in network.parameters()}
    assert named == {id(p) for p in method.parameters()}


def test_a_copy_without_weights_has_shapes_and_buffers():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(requires_grad=False)
    copied = without_weights(module)
    assert [(p.shape, p.requires_grad, p.is_meta) for p in copied.parameters()] == [
        (p.shape, p.requires_grad, True) for p in module.parameters()
    ]
    copied.load_state_dict(module.state_dict(), assign=True)
    inputs = torch.randn(4, 3)
    assert copied(inputs).equal(module(inputs))


def test_a_module_that_is_not_sharded_is_whole():
    module = nn.Linear(3, 2)
    assert not is_sharded(module)
    assert made_whole(module, without_weights(module)) is module
    load_whole(module, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert module(torch.ones(1, 3)).tolist() == [[3, 3]]


# by two processes


def alone(file, optimizer, **settings):
    """Train in this process, write the checkpoint, and return the losses."""
    return sharded_training.fit(vit_method(optimizer), file, optimizer=optimizer, **settings)[1].values


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return the folder that two processes have written, after one has written where they go on."""
    out = tmp_path_factory.mktemp("out")
    alone(out / "alone.ckpt", "lars")
    run_script("sharded_training.py", out)
    return out


@pytest.fixture(scope="module")
def found(shared):
    """Return what each process has found."""
    return [torch.load(shared / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same(got, expected):
    """Compare two checkpoints: weights, and what the optimizer keeps."""
    torch.testing.assert_close(got["state_dict"], expected["state_dict"], rtol=1e-5, atol=1e-5)
    (got_state,), (expected_state,) = got["optimizer_states"], expected["optimizer_states"]
    assert got_state["param_groups"] == expected_state["param_groups"]
    torch.testing.assert_close(got_state["state"], expected_state["state"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_and_losses_are_those_of_one_process(optimizer, shared, found, tmp_path):
    losses = alone(tmp_path / "alone.ckpt", optimizer)
    got = torch.load(shared / f"{optimizer}.ckpt", weights_only=True)
    expected = torch.load(tmp_path / "alone.ckpt", weights_only=True)
    assert_same(got, expected)
    assert got.keys() == expected.keys()
    begun = vit_method().state_dict()
    for name in ("online.backbone.blocks.1.mlp.fc1.weight", "target.projector.0.weight"):
        assert (got["state_dict"][name] - begun[name]).abs().max() > 1e-3
    means = [sum(pair) / 2 for pair in zip(*(each[optimizer]["losses"] for each in found), strict=True)]
    assert means == pytest.approx(losses, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("what", ["weights", "gradients", "states"])
def test_each_process_holds_about_half_of_all(optimizer, what, found):
    held, whole = zip(*(each[optimizer][what] for each in found), strict=True)
    assert whole[0] == whole[1] == sum(held) > 1000
    assert min(held) > 0.4 * whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_network_made_whole_again_embeds_as_its_checkpoint(optimizer, shared):
    method = vit_method()
    method.load_state_dict(torch.load(shared / f"{optimizer}.ckpt", weights_only=True)["state_dict"])
    embeddings = torch.load(shared / f"{optimizer}.embeddings.pt", weights_only=True)
    torch.testing.assert_close(embeddings, method.eval().embed(sharded_training.IMAGES))


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped_and_one_where_two_stopped(shared, tmp_path):
    alone(tmp_path / "alone.ckpt", "lars", max_epochs=2)
    alone(tmp_path / "resumed.ckpt", "lars", max_epochs=2, ckpt_path=shared / "lars.ckpt")
    expected = torch.load(tmp_path / "alone.ckpt", weights_only=True)
    for folder in (shared, tmp_path):
        assert_same(torch.load(folder / "resumed.ckpt", weights_only=True), expected)


@pytest.mark.slow
def test_all_processes_refuse_weights_that_one_finds_not_finite(found):
    for each in found:
        assert each["complaint"].startswith("the weights must be finite, got NaN or infinity")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive:UserWarning")  # by MLflow's own loading
def test_a_training_with_shared_weights_is_a_run_like_any_other(store, image_folder):
    words = [*WORDS, f"data_path={image_folder({'a': 20, 'b': 20})}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "mlflow_ssl", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert [point.step for point in store.get_metric_history(run.info.run_id, "val_acc")] == [0, 4]
    assert {path.name for path in (only_output() / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    network = mlflow.pytorch.load_model("models:/byol/1")
    images = torch.rand(3, 3, 16, 16)
    embeddings = network(images)
    assert embeddings.shape == (3, 12)
    assert embeddings.isfinite().all()
    assert embeddings.std(0).min() > 0

    one = ["trainer.max_epochs=3", "trainer.devices=1", "trainer.strategy=auto"]
    assert main([*words, "resume=last", *one]) == 0
    run = only_run(store)
    assert run.info.status == "FINISHED"
    steps = [point.step for point in store.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] > 4
    assert sorted(version.version for version in store.search_model_versions("name='byol'")) == [1, 2]
