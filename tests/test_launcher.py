"""MLflow's own launcher, for real: the words of the README arrive, and its run is the one that is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import SMALL, only_run

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
