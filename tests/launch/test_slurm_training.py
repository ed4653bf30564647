"""A training by submitit's own executor for one machine, which is told that its time is over."""

import signal
import time

import psutil
import pytest
from launching import assert_one_whole_run, launched
from training import only_run

pytest.importorskip("submitit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
EPOCHS = 100


def test_a_job_whose_time_is_over_saves_and_goes_on_in_its_run(store, image_folder, tmp_path):
    config = {"cluster": "local", "folder": "jobs", "timeout_min": 10}
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    with launched("slurm", config, image_folder({"a": 20, "b": 20}), tmp_path, epochs=EPOCHS) as process:
        deadline = time.monotonic() + 240
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        task = next(each for each in psutil.Process(process.pid).children(recursive=True) if is_task(each))
        task.send_signal(signal.SIGUSR2)  # as Slurm does before the end
        assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    run = only_run(store)
    assert_one_whole_run(store, run, backend="slurm", steps=EPOCHS)
    log = (tmp_path / "out" / "main.log").read_text()
    assert "SIGTERM: the training is saved at its next step, then it ends" in log
    assert f"going on with run {run.info.run_id}" in log


def is_task(process):
    """Return whether a process is the one of submitit that runs the job's function, not what has started it."""
    words = process.cmdline()
    return "submitit.core._submit" in words
