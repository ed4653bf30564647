"""What processes make of what the others say."""

import dataclasses
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from mlflow_ssl.callbacks import Pulse
from mlflow_ssl.errors import Interrupted, MachineError, ProcessError
from mlflow_ssl.siblings import Failure, Slips, State, lost_connection, standing_still
from mlflow_ssl.tasks.output import open_output, process_folder
from mlflow_ssl.watch import Watch

AT_WORK = State(moves=4, stepping=True, limit=45)
IN_A_COLLECTIVE = State(moves=4, stepping=True, limit=45, waiting=True)
BUSY = State(moves=4, limit=45)
HUNG = State(moves=4, limit=45, idle=46)
PATIENT = State(moves=4, limit=45, waiting=True)
FOR_NOTHING = State(moves=4, limit=45, waiting=True, idle=46)
STILL = {0: 46.0, 1: 46.0}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([IN_A_COLLECTIVE, AT_WORK], [1]),
        ([AT_WORK, IN_A_COLLECTIVE], [0]),
        ([AT_WORK, State(moves=3, stepping=True, limit=45)], [1]),
        ([IN_A_COLLECTIVE, IN_A_COLLECTIVE], [0, 1]),
        ([PATIENT, AT_WORK], [1]),  # in a validation, whose figures the first waits to make
        ([BUSY, IN_A_COLLECTIVE], []),
        ([BUSY, AT_WORK], []),
        ([PATIENT, PATIENT], []),
        ([State(moves=4, stepping=True, limit=100, waiting=True), State(moves=4, stepping=True, limit=90)], []),
        ([State(moves=4, stepping=True, limit=100, waiting=True), AT_WORK], [1]),  # which had a picture to draw before
        ([HUNG, IN_A_COLLECTIVE], [0]),  # with a picture, while the other has gone on to a batch
        ([PATIENT, HUNG], [1]),  # in the first batch
        ([FOR_NOTHING, FOR_NOTHING], [0, 1]),  # each for another
        ([FOR_NOTHING, PATIENT], []),  # the other computes backwards
        ([FOR_NOTHING, BUSY], []),
        ([HUNG, BUSY], []),
        ([State(moves=4, limit=45, idle=44), PATIENT], []),
    ],
)
def test_the_process_that_all_wait_for_stands_still(states, expected):
    assert standing_still(dict(enumerate(states)), STILL) == expected


def test_none_stands_still_where_one_moves():
    assert standing_still({0: IN_A_COLLECTIVE, 1: AT_WORK}, {0: 1.0, 1: 46.0}) == []


def test_the_first_failure_holds(tmp_path):
    first, second = Failure(1, "one"), Failure(2, "two", signum=15)
    assert Slips(tmp_path).failure() is None
    assert Slips(tmp_path).fail(first) == first
    assert Slips(tmp_path).fail(second) == first
    assert Slips(tmp_path).failure() == first
    assert (first.status, second.status) == ("FAILED", "KILLED")
    assert isinstance(first.error(), ProcessError)
    assert isinstance(second.error(), Interrupted)


def test_what_a_process_says_is_read_as_it_was_said(tmp_path):
    Slips(tmp_path).write(3, AT_WORK)
    assert Slips(tmp_path).read(3) == AT_WORK
    assert Slips(tmp_path).read(2) is None
    (tmp_path / "2.json").write_text('{"beat": 1')
    assert Slips(tmp_path).read(2) is None


def test_a_process_is_gone_when_it_has_ended_on_this_machine():
    ended = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    state = State(pid=ended.pid, born=psutil.Process(ended.pid).create_time())
    assert not state.gone
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:  # which nobody has asked for yet
        time.sleep(0.01)
    assert state.gone
    ended.wait()
    assert state.gone
    assert not dataclasses.replace(state, host="elsewhere").gone
    assert State(born=1.0).gone  # another process has its number
    assert not State().gone


def test_a_broken_connection_is_told_from_an_error_of_ones_own():
    lost = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"
    )
    follows = ValueError("no loss")
    follows.__cause__ = lost
    assert lost_connection(lost)
    assert lost_connection(follows)
    assert not lost_connection(RuntimeError("shape mismatch"))
    assert not lost_connection(ValueError("gloo"))


@pytest.fixture
def pair(tmp_path):
    """Return the first of two processes, which watches, and what the other says by."""
    watch = Watch()
    yield watch, Slips(tmp_path / "processes")
    if watch._thread is not None:
        watch._closed.set()


def others_error(watch, tmp_path, error, *, seconds=45.0):
    """Return what comes out of a training that an error ends."""
    with pytest.raises(BaseException) as raised, watch.over(tmp_path / "processes", seconds=seconds):  # noqa: PT011, PT012
        watch.begin(0, 2)
        raise error
    return raised.value


def test_an_error_of_ones_own_is_the_reason_and_the_others_are_told(pair, tmp_path):
    watch, slips = pair
    error = KeyError("a")
    assert others_error(watch, tmp_path, error) is error
    assert slips.failure() == Failure(0, "KeyError: 'a'")
    assert slips.read(0).ended


def test_a_broken_connection_has_the_others_error_for_a_reason(pair, tmp_path):
    watch, slips = pair
    slips.fail(Failure(1, "process 1 of 2: KeyError: 'b'"))
    found = others_error(watch, tmp_path, RuntimeError("gloo: Connection closed by peer"))
    assert isinstance(found, MachineError)
    assert str(found) == "process 1 of 2: KeyError: 'b'"


def test_a_process_that_is_not_stuck_ends_at_its_next_step(pair, tmp_path):
    watch, slips = pair
    with pytest.raises(ProcessError, match="process 1 of 2: a"), watch.over(tmp_path / "processes", seconds=1):  # noqa: PT012
        watch.begin(0, 2)
        watch.move(stepping=True)
        slips.fail(Failure(1, "process 1 of 2: a"))
        for _ in range(100):
            time.sleep(0.02)
            watch.move(stepping=True)


def test_a_signal_after_anothers_end_is_no_users(pair, tmp_path):
    watch, slips = pair
    ended = subprocess.Popen([sys.executable, "-c", ""])
    slips.write(1, State(pid=ended.pid))
    ended.wait()
    found = others_error(watch, tmp_path, Interrupted(15), seconds=2)
    assert str(found).startswith("process 1 of 2 ended without a word")


def test_a_signal_while_all_are_well_is_a_users(pair, tmp_path):
    watch, slips = pair
    slips.write(1, State(pid=os.getpid()))
    error = Interrupted(15)
    assert others_error(watch, tmp_path, error) is error
    assert slips.failure() == Failure(0, "stopped by SIGTERM", 15)


def test_an_attempt_to_resume_a_running_training_does_not_disturb_its_processes(tmp_path):
    with open_output(tmp_path, log_level="info"):
        running = process_folder(tmp_path)
        Slips(running).write(1, AT_WORK)
        with open_output(tmp_path, log_level="info", resumed=True):
            assert process_folder(tmp_path) != running
        assert Slips(running).read(1) == AT_WORK


def test_one_process_alone_is_not_watched(tmp_path):
    watch = Watch()
    with watch.over(tmp_path / "processes", seconds=45):
        watch.begin(0, 1)
        watch.move(stepping=True)
    assert not (tmp_path / "processes").exists()


def test_a_step_may_take_five_times_as_long_as_the_longest_before(pair, tmp_path, monkeypatch):
    watch, _ = pair
    now = [0.0]
    monkeypatch.setattr("mlflow_ssl.watch.time.monotonic", lambda: now[0])
    with watch.over(tmp_path / "processes", seconds=45):
        watch.begin(0, 2)
        for seconds, stepping, timed in ((1000, False, True), (20, True, True), (1, False, False), (1000, True, True)):
            now[0] += seconds  # of what went before
            watch.move(stepping=stepping, timed=timed)
        assert watch._state().limit == 100
        for _ in range(100):
            now[0] += 1
            watch.move(stepping=True)
        assert watch._state().limit == 45


def test_processes_go_at_one_pace_once_the_first_step_is_done_and_not_where_a_checkpoint_is_written(monkeypatch):
    moves, pulse = [], Pulse()
    monkeypatch.setattr("mlflow_ssl.callbacks.pulse.watch.move", lambda *, stepping, timed=True: moves.append(stepping))
    pulse.setup(None, None, "fit")
    pulse.on_train_batch_start()
    pulse.on_train_batch_end()
    pulse.on_train_batch_start()
    pulse.on_save_checkpoint(None, None, {})
    pulse.on_train_batch_end()
    pulse.on_validation_start(None, None)
    pulse.on_validation_batch_start()
    pulse.on_validation_batch_end()
    pulse.on_validation_end(None, None)
    assert moves == [False, False, True, True, False, True, False, True, True, False]


def idle_after(watch, seconds):
    """Return how long a process has been idle when its thread has slept."""
    time.sleep(seconds)
    return watch._state().idle


def test_a_process_that_sleeps_between_the_steps_is_idle_and_one_that_computes_or_asks_is_not(pair, tmp_path):
    watch, _ = pair
    with watch.over(tmp_path / "processes", seconds=1), socket.create_server(("127.0.0.1", 0)) as server:
        watch.begin(0, 2)
        assert idle_after(watch, 0.5) == 0  # the training is being prepared
        watch.move(stepping=False)
        assert 0.2 < idle_after(watch, 0.5) < 0.6
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass
        assert watch._state().idle < 0.2
        with socket.create_connection(server.getsockname(), timeout=0.5) as asking, asking.makefile("rb") as answer:
            with pytest.raises(TimeoutError):
                answer.read()
            assert watch._state().idle < 0.2
        watch.move(stepping=True)
        assert idle_after(watch, 0.5) == 0
