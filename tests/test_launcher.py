"""MLflow's own launcher, for real: the words of the README arrive, and its run is the one that is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_resuming import stop_at
from training import SMALL, only_run

from mlflow_ssl.cli import main

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def launch(*parameters, **options):
    """Run ``mlflow run`` on this project in the environment of the tests."""
    words = [word for parameter in parameters for word in ("-P", parameter)]
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "--env-manager", "local", *words]
    # the project's command is `python`: the one of the tests
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, env=os.environ | {"PATH": path} | options, capture_output=True, text=True, check=False, timeout=300
    )


def test_parameters_of_every_kind_arrive_and_the_launchers_run_finishes(store, image_folder, tmp_path):
    folder = image_folder({"a": 20, "b": 20}, name="two words, (1)")
    settings = [word for word in SMALL if not word.startswith(("experiment=", "trainer.max_epochs="))]
    done = launch(
        *settings,
        "experiment=byol",
        "trainer.max_epochs=1",
        f"data_path={folder}",
        f"core.output_dir={tmp_path / 'out'}",
        "scheduler.init_lr=1e-3",
        'overrides=+trainer.max_time=00:01:00:00 ~callbacks.pixel_baseline "core.tag=two words"',
        "registry.name=mine",
    )
    assert done.returncode == 0, done.stderr
    run = only_run(store)
    assert run.info.status == "FINISHED"
    params = run.data.params
    assert params["datamodule.data_path"] == str(folder)
    assert (params["trainer.max_epochs"], params["core.tag"]) == ("1", "two words")
    assert params["trainer.max_time"] == "00:01:00:00"
    assert "callbacks.pixel_baseline._target_" not in params
    assert float(params["optimizer.lr"]) == 1e-3
    assert store.get_model_version("mine", "1").run_id == run.info.run_id
    assert not list(ROOT.glob("mlruns"))


def test_a_mistake_fails_the_launchers_run_with_its_reason(store):
    done = launch("experiment=byoll")
    assert done.returncode != 0
    assert "error: experiment has no option 'byoll'; close matches: byol" in done.stderr
    assert "mlflow_ssl/" not in done.stderr  # no traceback of ours
    run = only_run(store)
    assert run.info.status == "FAILED"
    assert run.data.tags["mlflow_ssl.reason"].startswith("experiment has no option 'byoll'")


def test_a_resumed_run_goes_on_and_the_launchers_own_stands_below_it(store, image_folder):
    words = [*SMALL[1:], "experiment=base/ssl/byol", "callbacks.last_checkpoint.every_seconds=0"]
    words += ["trainer.check_val_every_n_epoch=1", "scheduler.warmup_epochs=0", "callbacks.pictures=null"]
    stop_at(2)
    assert main([*words, f"data_path={image_folder({'a': 20, 'b': 20})}"]) == 143
    stopped = only_run(store)
    done = launch(f"resume={stopped.info.run_id}")
    assert done.returncode == 0, done.stderr
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    runs = {run.info.run_id: run for run in store.search_runs(experiments)}
    resumed = runs.pop(stopped.info.run_id)
    assert resumed.info.status == "FINISHED"
    steps = [point.step for point in store.get_metric_history(resumed.info.run_id, "train/loss")]
    assert steps == list(range(1, len(steps) + 1))
    (launched,) = runs.values()
    assert launched.info.status == "FINISHED"
    assert launched.data.tags["mlflow.parentRunId"] == resumed.info.run_id
    assert f"run {resumed.info.run_id} was resumed instead" in launched.data.tags["mlflow.note.content"]
