"""Resuming within an epoch where the views are finished on the device, and where shards are streamed."""

import shutil

import pytest
import torch
from conftest import write_images
from shards import write_shards
from test_resuming import WORDS, stop_at
from training import only_output

from mlflow_ssl.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

DEVICE = ("transforms=byol_device",)


@pytest.fixture(params=["device", "stream"])
def words(request, store, tmp_path):
    if request.param == "device":
        data = write_images(tmp_path / "images", {"dark": 24, "light": 20, "middle": 22}, size=20)
        return [*WORDS, *DEVICE, f"data_path={data}"]
    data = write_shards(tmp_path / "shards", [20] * 4)
    return [*WORDS, f"data_path={data}", "datamodule.num_workers=2"]


def finished():
    return torch.load(only_output() / "checkpoints" / "last.ckpt", weights_only=True)


def test_it_ends_as_if_never_stopped(words, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert main(words) == 0
    whole = finished()
    shutil.rmtree("outputs")
    stop_at(8)  # in the second epoch
    assert main([*words, "core.name=again"]) == 143
    assert 8 <= finished()["global_step"] < whole["global_step"]
    assert main([*words, "core.name=again", "resume=last"]) == 0
    resumed = finished()
    assert resumed["global_step"] == whole["global_step"]
    for name, weights in whole["state_dict"].items():
        assert weights.equal(resumed["state_dict"][name]), name
