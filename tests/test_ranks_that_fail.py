"""A process of several that dies, hangs or raises ends the whole training, which then goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from training import SMALL, only_output, only_run

from mlflow_ssl.schedules import cosine_tau, warmup_cosine

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

HERE = Path(__file__).parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
}
LEAN = (
    *SMALL,
    "trainer.check_val_every_n_epoch=2",
    "callbacks.pictures=null",
    "callbacks.health=null",
    "callbacks.linear_probe=null",
    "core.hang_seconds=5",
)


class Training:
    """A training by several processes, with the fate of one of them.

    Args:
        folder: the current folder.
        data: images.
        start: starts it with words.
    """

    def __init__(self, folder, data, start):
        self.folder, self.data, self.start = folder, data, start

    def breaks(self, way, *, process, step=3, words=(), during=None):
        """Train until a process fails in a way, and return the exit code and what was printed."""
        breaker = ["+callbacks.breaker._target_=breaker.Breaker", f"+callbacks.breaker.way={way}"]
        breaker += [f"+callbacks.breaker.process={process}", f"+callbacks.breaker.step={step}"]
        return self.start([*LEAN, f"data_path={self.data}", *breaker, *words], during)


@pytest.fixture(scope="module")
def forking():
    """Return a process that starts trainings as torchrun does; see `forked`."""
    command = [sys.executable, str(HERE / "forked.py")]
    with subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def torchrun(forking, store, image_folder, tmp_path):
    """Return a training by torchrun's agent."""

    def start(words, during=None, processes=2):
        kept = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
        asked = {"folder": str(Path.cwd()), "log": str(tmp_path / "log"), "processes": processes, "words": words}
        forking.stdin.write(json.dumps(asked | {"environment": kept}) + "\n")
        forking.stdin.flush()
        agent = int(forking.stdout.readline())
        if during is not None:
            during(psutil.Process(agent))
        code = int(forking.stdout.readline())
        wait_for_the_rest()
        return code, (tmp_path / "log").read_text()

    return Training(tmp_path, image_folder({"a": 40, "b": 40}), start)


@pytest.fixture
def lightning(store, image_folder, tmp_path):
    """Return a training by Lightning's own launcher."""

    def start(words, during=None, processes=2):
        command = [sys.executable, "-m", "mlflow_ssl", *words, f"trainer.devices={processes}", "trainer.strategy=ddp"]
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log) as process,
        ):
            try:
                if during is not None:
                    during(psutil.Process(process.pid))
                code = process.wait(120)
            finally:
                process.kill()
        wait_for_the_rest()
        return code, (tmp_path / "log").read_text()

    return Training(tmp_path, image_folder({"a": 40, "b": 40}), start)


def assert_ended(store, code, printed, *, status, reason, lines=1):
    """Check that the one run has ended, and is not registered."""
    run = only_run(store)
    assert run.info.status == status, printed[-3000:]
    assert reason in run.data.tags["mlflow_ssl.reason"], printed[-3000:]
    assert code != 0
    said = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(said) == lines, printed[-3000:]
    assert all(reason in line for line in said)
    assert not store.search_model_versions("name='byol'")


def wait_for_the_rest(seconds=15):
    """Return once no process runs in this folder."""
    folder, until = str(Path.cwd()), time.monotonic() + seconds
    while left := [each for each in psutil.process_iter() if _is_of(each, folder)]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def _is_of(process, folder):
    try:
        return process.pid != os.getpid() and process.cwd() == folder and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


REASONS = {
    "raises": "process 1 of 2: ValueError: cannot see the forest",
    "is killed": "process 1 of 2 ended without a word",
    "hangs": "process 1 of 2 has stood still for",
    "is stopped": "process 1 of 2 has not been heard of for",
}


@pytest.mark.parametrize("way", REASONS)
def test_where_one_of_torchruns_processes_fails_the_run_says_which_and_why(torchrun, store, way):
    code, printed = torchrun.breaks(way, process=1)
    assert_ended(store, code, printed, status="FAILED", reason=REASONS[way])


def test_a_process_that_hangs_in_the_first_batch_is_named(torchrun, store):
    code, printed = torchrun.breaks("hangs", process=1, step=0, words=["core.hang_seconds=4"])
    assert_ended(store, code, printed, status="FAILED", reason="process 1 of 2 has stood still for")
    assert "at hang (breaker.py:" in printed


def test_the_first_process_may_work_between_the_epochs_while_the_others_wait_and_not_hang(torchrun, store):
    dawdler = ["+callbacks.dawdler._target_=breaker.Dawdler", "+callbacks.dawdler.seconds=5"]
    words = ["core.hang_seconds=4", "trainer.max_epochs=3", *dawdler]
    code, printed = torchrun.breaks("goes on", process=1, words=words)
    assert_ended(store, code, printed, status="FAILED", reason="process 0 of 2 has stood still for")
    assert "at hang (breaker.py:" in printed


def test_where_the_first_process_raises_its_error_is_the_runs(torchrun, store):
    code, printed = torchrun.breaks("raises", process=0)
    assert_ended(store, code, printed, status="FAILED", reason="ValueError: cannot see the forest", lines=0)
    assert "FAILED: ValueError: cannot see the forest" in printed  # and the traceback


@pytest.mark.parametrize(
    ("way", "reason"), [("is killed", "ended without a word"), ("is stopped", "has not been heard of for")]
)
def test_where_the_first_process_is_gone_another_ends_its_run(torchrun, store, way, reason):
    code, printed = torchrun.breaks(way, process=0)
    assert_ended(store, code, printed, status="FAILED", reason=f"process 0 of 2 {reason}")


def test_a_user_who_stops_torchrun_stops_a_run_that_was_well(torchrun, store):
    def stop(agent):
        wait_for("broken")
        agent.terminate()

    code, printed = torchrun.breaks("goes on", process=1, words=["trainer.max_epochs=1000"], during=stop)
    assert_ended(store, code, printed, status="KILLED", reason="stopped by SIGTERM", lines=0)
    assert (only_output() / "checkpoints" / "last.ckpt").exists()


def wait_for(name, seconds=60):
    """Return once there is a file."""
    until = time.monotonic() + seconds
    while not Path(name).exists():
        assert time.monotonic() < until, f"there is no {name}"
        time.sleep(0.05)


def test_where_one_of_lightnings_processes_is_killed_the_run_says_by_what(lightning, store):
    code, printed = lightning.breaks("is killed", process=1)
    assert_ended(store, code, printed, status="FAILED", reason="process 1 of 2 was killed (SIGKILL)")


def test_where_lightnings_first_process_is_killed_another_ends_its_run(lightning, store):
    code, printed = lightning.breaks("is killed", process=0)
    assert_ended(store, code, printed, status="FAILED", reason="process 0 of 2 ended without a word")


def test_a_user_who_stops_the_first_process_stops_all(lightning, store):
    def stop(first):
        wait_for("broken")
        first.terminate()

    code, printed = lightning.breaks("goes on", process=1, words=["trainer.max_epochs=1000"], during=stop)
    assert_ended(store, code, printed, status="KILLED", reason="stopped by SIGTERM", lines=0)
    assert code == 143


EPOCHS = 6


@pytest.mark.parametrize("now", [1, 3])
def test_after_a_failure_another_number_of_processes_goes_on_in_epoch_and_schedule(torchrun, store, now):
    words = [
        f"trainer.max_epochs={EPOCHS}",
        "callbacks.last_checkpoint.every_seconds=0",
        "scheduler.reference_batch=256",
        "+callbacks.witness._target_=breaker.Witness",
    ]
    code, printed = torchrun.breaks("is killed", process=1, step=12, words=words)
    assert_ended(store, code, printed, status="FAILED", reason=REASONS["is killed"])
    before, resumed_at = seen(), 10  # processes agree on a checkpoint each tenth step
    code, printed = torchrun.start(["resume=last"], processes=now)
    assert code == 0, printed[-3000:]
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert [version.version for version in store.search_model_versions("name='byol'")] == [1]
    steps = [point.step for point in store.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(1, steps[-1] + 1))

    whole, rest = before[before.epoch == 1], seen()
    assert rest.step.min() == resumed_at
    trained = pd.concat([before[before.step < resumed_at], rest])
    assert set(trained.epoch) == set(range(EPOCHS))
    assert not trained.duplicated(["epoch", "row"]).any()
    (cut,) = set(before[before.step < resumed_at].epoch) & set(rest.epoch)
    left_out = len(whole) - (trained.epoch == cut).sum()
    assert 0 <= left_out < 8 * now + now + 1

    per_epoch = rest[rest.epoch == EPOCHS - 1].step.nunique()
    total = EPOCHS * per_epoch
    assert len(set(rest.step)) < total
    rate = 1e-3 * 8 * now / 256
    share = warmup_cosine(total - 1, total_steps=total, warmup_steps=2 * per_epoch)
    assert last(store, run, "train/lr") == pytest.approx(rate * share, rel=1e-5)
    tau = cosine_tau(total - 1, total_steps=total, base=0.99)
    assert last(store, run, "train/tau") == pytest.approx(tau, abs=1e-7)


def seen():
    """Return the images that were trained on since this was last asked."""
    files = list(Path().glob("seen-*.txt"))
    rows = pd.concat([pd.read_csv(file, sep=" ", names=["epoch", "step", "row"]) for file in files], ignore_index=True)
    for file in files:
        file.unlink()
    return rows


def last(client, run, metric):
    """Return the last value of a metric."""
    return client.get_metric_history(run.info.run_id, metric)[-1].value
