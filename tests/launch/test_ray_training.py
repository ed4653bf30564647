"""A training on a real local Ray, of which a worker hangs and one is killed."""

import time

import psutil
import pytest
from launching import assert_one_whole_run, launched
from training import only_run

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
EPOCHS = 40


def test_workers_that_hang_or_are_killed_are_replaced_and_their_run_goes_on(store, image_folder, tmp_path):
    config = {"num_workers": 2, "max_failures": 2}
    breaker = {"_target_": "breaker.Breaker", "way": "hangs", "process": 1, "step": 25, "file": tmp_path / "broken"}
    added = " ".join(f"+callbacks.breaker.{key}={value}" for key, value in breaker.items())
    words = [f"overrides={added}", "callbacks.last_checkpoint.every_seconds=0", "core.hang_seconds=10"]
    data = image_folder({"a": 20, "b": 20})
    with launched("ray", config, data, tmp_path, epochs=EPOCHS, words=words) as process:
        again, deadline = "going on with run", time.monotonic() + 240
        while not said(again, tmp_path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        victim = next(each for each in psutil.Process(process.pid).children(recursive=True) if is_worker(each))
        victim.kill()
        assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert said("process 1 of 2 has stood still for 1", tmp_path)
    run = only_run(store)
    assert_one_whole_run(store, run, backend="ray", steps=EPOCHS)
    assert said(f"{again} {run.info.run_id}", tmp_path) > 2  # by each of two workers


def said(words, folder):
    """Return how often the training's log says something."""
    log = folder / "out" / "main.log"
    return log.read_text().count(words) if log.exists() else 0


def is_worker(process):
    return "RayTrainWorker" in " ".join(process.cmdline())
