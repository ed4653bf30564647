"""What two processes measure together is what one process measures."""

import pytest
import torch
from conftest import write_images
from scripts import run_script
from tiny import quiet_trainer, tiny_method
from torch import nn
from two_processes import callbacks, datamodule, kept

from mlflow_ssl.datasets.sampler import DealtBatches

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of three classes that look alike: 36 of the 58 images train, 11 validate, 11 test."""
    folder = tmp_path_factory.mktemp("shared") / "images"
    for number, (name, count) in enumerate({"a": 21, "b": 20, "c": 17}.items()):
        write_images(folder, {name: count}, size=8, seed=number)  # one class alone is not brighter than another
    return folder


@pytest.fixture(scope="module")
def found(images, tmp_path_factory):
    """Return what each of two processes has found."""
    out = tmp_path_factory.mktemp("out")
    run_script("two_processes.py", images, out, "2")
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module", params=["untrained", "trained", "tested", "one batch"])
def both(request, images, found):
    """Return what two processes have found at a moment, and what one finds with the same weights."""
    used, method = callbacks(), tiny_method()
    if request.param != "untrained":
        method.load_state_dict(found[0]["weights"])
    trainer = quiet_trainer(callbacks=list(used.values()))
    evaluate = trainer.test if request.param == "tested" else trainer.validate
    evaluate(method, datamodule(images, 30 if request.param == "one batch" else 4), verbose=False)
    return found[0][request.param], kept(trainer.callback_metrics, used["knn"])


def test_every_metric_is_that_of_one_process(both):
    shared, alone = both
    training_only = {"val_acc_linear", "embedding/agreement", "baseline_acc_pixels"}
    names = set(shared["metrics"]) & set(alone["metrics"])
    assert set(shared["metrics"]) - names <= training_only | {"train/loss", "train/tau"}
    assert set(alone["metrics"]) - names <= training_only
    accuracy = shared["metrics"].get("test_acc", shared["metrics"].get("val_acc"))
    assert 0 < accuracy < 1
    for name in names:
        assert shared["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-4, abs=1e-5), name


def test_every_image_is_embedded_once_and_in_its_order(both):
    shared, alone = (each["evaluated"] for each in both)
    for name, expected in alone.items():
        torch.testing.assert_close(shared[name], expected, rtol=1e-5, atol=1e-6)


def test_all_processes_have_the_same_metrics(found):
    for moment in ("untrained", "trained", "tested", "one batch"):
        first, second = (each[moment]["metrics"] for each in found)
        assert first.keys() == second.keys()
        for name in first:
            assert first[name] == second[name], name


def test_only_the_first_process_holds_the_bank(found):
    assert all(found[0][moment]["evaluated"] for moment in ("untrained", "trained", "tested", "one batch"))
    assert not any(found[1][moment]["evaluated"] for moment in ("untrained", "trained", "tested", "one batch"))


def test_the_linear_classifier_is_that_of_the_first_process(found):
    probe, evaluated = found[0]["probe"], found[0]["trained"]["evaluated"]
    classifier = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)).eval()
    classifier.load_state_dict(probe)
    with torch.no_grad():
        right = (classifier(evaluated["queries"]).argmax(1) == evaluated["truth"]).double().mean()
    assert found[0]["trained"]["metrics"]["val_acc_linear"] == pytest.approx(float(right))
    for name, value in found[1]["probe"].items():
        torch.testing.assert_close(value, probe[name])


def test_batches_are_dealt_unevenly_and_one_is_borrowed(images):
    module = datamodule(images, 4)
    sizes = {name: len(module.index.split(name)) for name in ("train", "val")}
    assert [len(DealtBatches(sizes["train"], 4, rank, 2)) for rank in range(2)] == [5, 4]
    assert [DealtBatches(sizes["val"], 30, rank, 2).borrowed for rank in range(2)] == [False, True]
