"""A signal ends the program where it stands; a training, at its next step."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from mlflow_ssl import signals as module
from mlflow_ssl.errors import Interrupted
from mlflow_ssl.signals import StopSignals

NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)


@pytest.fixture
def signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield StopSignals()
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@NUMBERS
def test_a_signal_is_raised_where_the_program_stands(signals, number):
    cleaned = []
    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught, signals.raised():  # noqa: PT012
        try:
            kill(number)
            pytest.fail("it went on")
        finally:
            cleaned.append(True)
    assert caught.value.exit_code == 128 + number
    assert cleaned


@NUMBERS
def test_a_signal_that_is_awaited_waits_to_be_asked_for(signals, number):
    with pytest.raises(Interrupted, match=f"stopped by {number.name}"), signals.raised():  # noqa: PT012
        with signals.awaited():
            assert signals.received() is None
            kill(number)
            assert signals.received() == number
            went_on = True
        pytest.fail("what comes after a training was begun")
    assert went_on


def test_a_training_without_a_signal_ends_as_it_does(signals):
    with signals.raised():
        with signals.awaited():
            pass
        assert signals.received() is None


def test_what_the_training_raises_is_not_covered_up(signals):
    with pytest.raises(ZeroDivisionError), signals.raised(), signals.awaited():  # noqa: PT012
        kill()
        raise ZeroDivisionError


def test_after_the_training_a_signal_does_not_wait(signals):
    with pytest.raises(Interrupted), signals.raised():  # noqa: PT012
        with signals.awaited():
            pass
        kill()
        pytest.fail("it went on")


def test_a_second_signal_does_not_wait(signals):
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), signals.raised(), signals.awaited():  # noqa: PT012
        kill(signal.SIGTERM)
        kill(signal.SIGINT)
        pytest.fail("it went on")


def test_a_step_that_takes_too_long_is_not_waited_for(signals, monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), signals.raised(), signals.awaited():  # noqa: PT012
        kill(signal.SIGTERM)
        time.sleep(30)
        pytest.fail("it went on")
    assert 0.1 <= time.monotonic() - began < 5


def test_a_training_that_ends_in_time_is_not_disturbed_later(signals, monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    with signals.raised():
        with pytest.raises(Interrupted), signals.awaited():
            kill()
        time.sleep(0.2)  # such as for what is uploaded then


def test_the_next_program_knows_nothing_of_an_earlier_ones_signal(signals):
    with pytest.raises(Interrupted), signals.raised(), signals.awaited():
        kill()
    with signals.raised(), signals.awaited():
        assert signals.received() is None


def test_our_handlers_are_put_back_where_another_took_their_place(signals):
    with pytest.raises(Interrupted), signals.raised(), signals.awaited():  # noqa: PT012
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.install()
        kill()
        assert signals.received() == signal.SIGTERM


def test_another_thread_leaves_the_handlers_alone(signals):
    before, after = signal.getsignal(signal.SIGTERM), []

    def run():
        with signals.raised(), signals.awaited():
            signals.install()
            after.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert after == [before]


PROGRAM = """
    import sys, time
    from mlflow_ssl.errors import Interrupted
    from mlflow_ssl.signals import stop_signals

    try:
        with stop_signals.raised():
            with stop_signals.awaited():
                print("begun", flush=True)
                while stop_signals.received() is None:
                    time.sleep(0.01)
                print("saved", flush=True)
    except Interrupted as error:
        sys.exit(error.exit_code)
"""


@NUMBERS
def test_a_program_that_is_sent_a_signal_saves_and_exits(number):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "begun\n"
            process.send_signal(number)
            assert process.stdout.read() == "saved\n"
            assert process.wait(timeout=30) == 128 + number
        finally:
            process.kill()
