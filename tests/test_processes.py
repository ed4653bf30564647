"""Processes that torchrun starts all at once."""

import os
import subprocess
import sys
import warnings

import pytest
from omegaconf import OmegaConf
from training import SMALL, only_output, only_run

from mlflow_ssl.errors import InputError
from mlflow_ssl.processes import fit_to_processes, from_first, join


def test_alone_the_first_process_is_this_one():
    assert from_first(lambda: 3) == 3
    with pytest.raises(InputError, match="a mistake"):
        from_first(lambda: _raise(InputError("a mistake")))


def _raise(error):
    raise error


def test_slurms_programs_on_a_machine_are_no_reason_to_say_anything(tmp_path, monkeypatch):
    """A mistake of the user is one line there too."""
    srun = tmp_path / "srun"
    srun.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        join(gpu=False)
    assert not caught


def test_alone_the_config_decides_about_devices():
    trainer = OmegaConf.create({"devices": 4, "num_nodes": 2, "strategy": "auto"})
    fit_to_processes(trainer)
    assert trainer == {"devices": 4, "num_nodes": 2, "strategy": "auto"}


@pytest.mark.parametrize("strategy", ["auto", {"_target_": "mlflow_ssl.sharding.ShardedStrategy"}])
def test_a_group_that_a_launcher_has_made_decides_about_devices_and_the_config_about_its_strategy(
    monkeypatch, strategy
):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    trainer = OmegaConf.create({"devices": 1, "num_nodes": 1, "strategy": strategy})
    fit_to_processes(trainer)
    assert trainer == {"devices": 2, "num_nodes": 2, "strategy": "ddp" if strategy == "auto" else strategy}


def torchrun(*words):
    """Train in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "mlflow_ssl", *SMALL, *words]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
def test_torchruns_processes_train_into_one_run_and_one_version(store, image_folder):
    done = torchrun(f"data_path={image_folder({'a': 20, 'b': 20})}")
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.strategy"] == "ddp"
    assert [version.version for version in store.search_model_versions("name='byol'")] == [1]
    # 24 to 28 training images in batches of 8 over two processes
    assert [point.step for point in store.get_metric_history(run.info.run_id, "val_acc")] == [0, 4]
    assert {path.name for path in (only_output() / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    said = (only_output() / "main.log").read_text()
    assert said.count("BatchNorm normalizes by the images of all 2 processes") == 1
    assert "sync_dist" not in said


@pytest.mark.slow
def test_a_mistake_is_said_once_by_all(store):
    done = torchrun("data_path=/nowhere")
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: datamodule.data_path must be an existing folder, got /nowhere")
    assert not store.search_runs([experiment.experiment_id for experiment in store.search_experiments()])
