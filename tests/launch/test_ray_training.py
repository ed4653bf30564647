"""A training on a real local Ray, of which a worker is killed."""

import time

import psutil
import pytest
from launching import assert_one_whole_run, launched
from training import only_run

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
EPOCHS = 100


def test_a_killed_worker_is_replaced_and_its_run_goes_on(store, image_folder, tmp_path):
    config = {"num_workers": 2, "max_failures": 2}
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    with launched("ray", config, image_folder({"a": 20, "b": 20}), tmp_path, epochs=EPOCHS) as process:
        deadline = time.monotonic() + 240
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        victim = next(each for each in psutil.Process(process.pid).children(recursive=True) if is_worker(each))
        victim.kill()
        assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    run = only_run(store)
    assert_one_whole_run(store, run, backend="ray", steps=EPOCHS)
    assert f"going on with run {run.info.run_id}" in (tmp_path / "out" / "main.log").read_text()


def is_worker(process):
    return "RayTrainWorker" in " ".join(process.cmdline())
