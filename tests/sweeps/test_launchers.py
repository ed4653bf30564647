"""Trainings in processes of their own, here and through other people's launchers."""

import contextlib
import os
import sys
import time

import pytest

from mlflow_ssl.errors import InputError
from mlflow_ssl.sweeps import launchers
from mlflow_ssl.sweeps.launchers import (
    LOST,
    AdoptedJob,
    LocalLauncher,
    RayLauncher,
    SubmititLauncher,
    shares,
    visible_gpus,
)
from mlflow_ssl.sweeps.process import Training
from mlflow_ssl.tracking.run import lock_output

pytestmark = pytest.mark.filterwarnings("default")
PROGRAM = """
import os, signal, sys, time
word = sys.argv[1]
print(word, os.environ.get("OMP_NUM_THREADS"), os.environ.get("GIVEN"), os.environ.get("UNWANTED"), flush=True)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    open("waiting", "w").close()
    time.sleep(100)
sys.exit(int(word))
"""


@pytest.fixture
def training(tmp_path, monkeypatch):
    """Return a function that describes a training that ends with the code that its word says."""
    (tmp_path / "mlflow_ssl").mkdir()
    (tmp_path / "mlflow_ssl" / "__main__.py").write_text(PROGRAM)
    monkeypatch.setenv("UNWANTED", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(word):
        return Training((word,), tmp_path, tmp_path / f"{word}.log", {"GIVEN": "g"}, ("UNWANTED",))

    return make


def ended(job, seconds=120):
    end = time.monotonic() + seconds
    while job.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    return job.poll()


def stopped(job, here, seconds=120):
    end = time.monotonic() + seconds
    while not (here / "waiting").exists() and time.monotonic() < end:
        time.sleep(0.05)
    job.stop()
    return ended(job)


def test_this_machines_trainings_end_each_for_itself(training, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "usable_cores", lambda: 9)
    launcher = LocalLauncher(3)
    good, killed, waiting = (launcher.start(training(word)) for word in ("0", "kill", "wait"))
    assert (ended(good), ended(killed)) == (0, -9)
    again = launcher.start(training("2"))  # in the place of one that has ended
    assert ended(again) == 2
    assert waiting.poll() is None
    assert stopped(waiting, tmp_path) == 143
    assert (tmp_path / "0.log").read_text() == "0 3 g None\n"


def test_a_training_that_does_not_listen_is_killed(training, tmp_path):
    job = LocalLauncher(1).start(training("wait"))
    job.kill()
    assert ended(job) == -9


@pytest.mark.slow
def test_submitits_own_processes_do_the_same(training, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install submitit")
    options = {"cluster": "local", "timeout_min": 10}
    with contextlib.closing(SubmititLauncher(options, tmp_path / "submitit")) as launcher:
        _assert_run_elsewhere(launcher, training, tmp_path)


@pytest.mark.slow
def test_rays_workers_do_the_same(training, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    with contextlib.closing(RayLauncher({"num_cpus": 0.1})) as launcher:
        _assert_run_elsewhere(launcher, training, tmp_path)


def _assert_run_elsewhere(launcher, training, folder):
    good, bad, killed, waiting = (launcher.start(training(word)) for word in ("0", "2", "kill", "wait"))
    assert [ended(job) for job in (good, bad, killed)] == [0, 2, -9]
    assert stopped(waiting, folder) == 143
    assert " g None\n" in (folder / "0.log").read_text()
    lost = launcher.start(training("wait"))
    (folder / "waiting").unlink()
    stopped_at = time.monotonic() + 60
    while not (folder / "waiting").exists() and time.monotonic() < stopped_at:
        time.sleep(0.05)
    lost.kill()
    assert ended(lost) == LOST


@pytest.mark.parametrize(
    ("jobs", "gpus", "devices"),
    [
        (2, ["0", "1"], ["0", "1"]),
        (2, ["4", "5", "6", "7", "8"], ["4,5", "6,7"]),
        (3, ["0", "GPU-ab"], ["0", "GPU-ab", "0"]),
        (2, [], [None, None]),
    ],
)
def test_gpus_are_shared_out(jobs, gpus, devices):
    found = shares(jobs, gpus=gpus, cores=5)
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in found] == devices
    assert {share["OMP_NUM_THREADS"] for share in found} == {str(max(5 // jobs, 1))}


@pytest.mark.parametrize(("given", "seen"), [("0,2", ["0", "2"]), ("", []), ("-1", []), (None, ["0", "1", "2"])])
def test_gpus_that_are_hidden_from_the_sweep_stay_hidden(monkeypatch, given, seen):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == seen
    assert LocalLauncher(None).jobs == max(len(seen), 1)


def test_a_launcher_that_is_not_installed_is_one_line(monkeypatch, tmp_path):
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, make in {"ray": lambda: RayLauncher({}), "submitit": lambda: SubmititLauncher({}, tmp_path)}.items():
        with pytest.raises(InputError, match=rf"sweep.launcher={name} needs .*pip install 'mlflow_ssl\[{name}\]'"):
            make()


def test_an_option_that_submitit_does_not_know_is_one_line(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install submitit")
    with pytest.raises(InputError, match=r"sweep.submitit must be what submitit takes, got .*'timeout'"):
        SubmititLauncher({"cluster": "local", "timeout": 3}, tmp_path)


def test_a_training_that_has_its_folder_locked_is_still_running(training, tmp_path):
    lock = lock_output(tmp_path)
    job = AdoptedJob(tmp_path / "tracking" / "lock", training("0"))
    assert job.poll() is None
    lock.release()
    assert job.poll() == LOST


def test_no_variable_of_the_sweep_is_left_behind(training):
    before = dict(os.environ)
    ended(LocalLauncher(2).start(training("0")))
    assert dict(os.environ) == before
