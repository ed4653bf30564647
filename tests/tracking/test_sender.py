"""Everything arrives once and in order, however often it fails; what is refused holds up nothing."""

import logging
import threading
import time

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

from mlflow_ssl.tracking import sender as module
from mlflow_ssl.tracking.journal import Journal
from mlflow_ssl.tracking.sender import Sender


class Store:
    """Takes up to three entries a request, if it does not fail first.

    Args:
        failures: how many requests fail before it takes anything.
        guilty: numbers of the entries that it refuses.
    """

    def __init__(self, *, failures=0, guilty=()):
        self.failures = failures
        self.guilty = guilty
        self.taken, self.requests = [], []
        self.asked = threading.Event()

    def __call__(self, entries):
        numbers = [entry["number"] for entry in entries[:3]]
        self.requests.append(numbers)
        self.asked.set()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("http://me:hunter2@host is down")
        if set(numbers) & set(self.guilty):
            raise MlflowException(f"none of {numbers}", error_code=INVALID_PARAMETER_VALUE)
        self.taken += numbers
        return len(numbers)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 0.01)
    monkeypatch.setattr(module, "LONGEST_RETRY", 0.01)


@pytest.fixture
def journal(tmp_path):
    opened = Journal(tmp_path, "records")
    yield opened
    opened.close()


@pytest.fixture
def started(journal):
    """Return a function that starts a sender; it is stopped in the end."""
    senders = []

    def start(send):
        senders.append(Sender(journal, send))
        senders[-1].start()
        return senders[-1]

    yield start
    for sender in senders:
        sender.stop()
        assert not sender.is_alive()


def say(journal, *numbers):
    for number in numbers:
        journal.append({"kind": "metrics", "number": number})


def test_all_arrives_in_order(journal, started):
    store = Store()
    say(journal, *range(5))
    sender = started(store)
    say(journal, *range(5, 10))
    assert sender.drain(patience=10)
    assert store.taken == list(range(10))
    assert journal.sent == journal.written


def test_what_fails_is_sent_again_until_it_succeeds_and_then_not_again(journal, started, caplog):
    caplog.set_level(logging.INFO, logger="mlflow_ssl")
    store = Store(failures=3)
    say(journal, *range(5))
    sender = started(store)
    assert sender.drain(patience=20)
    assert store.requests == [*[[0, 1, 2]] * 4, [3, 4]]
    assert store.taken == [0, 1, 2, 3, 4]
    assert sender.trouble == ""
    # said once, not at each try
    first, second = (record.getMessage() for record in caplog.records)
    assert f"it is kept in {journal.file.parent} and sent again (ConnectionError: http://***@host is down)" in first
    assert second == "MLflow answers again"


def test_trouble_says_why_while_it_lasts(journal, started):
    store = Store(failures=10**6)
    say(journal, 0)
    sender = started(store)
    assert not sender.drain(patience=0.2)
    assert sender.trouble == "ConnectionError: http://***@host is down"


def test_a_servers_own_error_is_no_refusal(journal, started):
    def send(entries):
        tries.append(1)
        if len(tries) == 1:
            raise MlflowException("out of order", error_code=INTERNAL_ERROR)
        return len(entries)

    tries = []
    say(journal, 0)
    sender = started(send)
    assert sender.drain(patience=10)
    assert (len(tries), sender.refused) == (2, [])


@pytest.mark.parametrize("guilty", [(0,), (1,), (2,), (4,), (0, 1, 2), (1, 3, 6)])
def test_of_a_refused_request_only_the_guilty_are_set_aside(journal, started, guilty):
    store = Store(guilty=guilty)
    say(journal, *range(7))
    sender = started(store)
    assert sender.drain(patience=10)
    assert store.taken == [number for number in range(7) if number not in guilty]
    assert sender.refused == [f"none of [{number}]" for number in guilty]
    assert [entry["number"] for entry in journal] == list(range(7))  # still on disk


def test_what_arrived_before_the_end_is_not_sent_by_the_next_sender(journal, started, monkeypatch):
    store = Store()
    say(journal, 0, 1)
    first = started(store)
    assert first.drain(patience=10)
    first.stop()
    say(journal, 2)
    assert started(store).drain(patience=10)
    assert store.taken == [0, 1, 2]


def test_patience_begins_anew_with_each_success(journal, started):
    def slow(entries):
        time.sleep(0.1)
        return 1

    say(journal, *range(8))
    assert started(slow).drain(patience=0.4)


def test_the_deadline_holds_whatever_succeeds(journal, started):
    def slow(entries):
        time.sleep(0.1)
        return 1

    say(journal, *range(50))
    began = time.monotonic()
    assert not started(slow).drain(patience=60, deadline=began + 0.3)
    assert time.monotonic() - began < 2


def test_a_request_that_hangs_is_given_up(journal, started):
    released = threading.Event()

    def hang(entries):
        released.wait()
        return len(entries)

    say(journal, 0)
    began = time.monotonic()
    assert not started(hang).drain(patience=0.2)
    assert time.monotonic() - began < 2
    released.set()


def test_a_sender_that_is_hurried_does_not_rest(journal, started, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 3600.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 3600.0)
    store = Store()
    say(journal, 0)
    sender = started(store)
    assert store.asked.wait(10)
    say(journal, 1)
    time.sleep(0.2)
    assert store.taken == [0]  # it rests
    assert sender.drain(patience=10)
    assert store.taken == [0, 1]


def test_a_sender_that_is_hurried_asks_a_dead_server_soon_again(journal, started, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_RETRY", 3600.0)
    store = Store(failures=6)  # 31 s of retries for one that is not hurried
    say(journal, 0)
    began = time.monotonic()
    assert started(store).drain(patience=20)
    assert time.monotonic() - began < 10


def test_after_a_drain_that_was_given_up_it_rests_again(journal, started, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 3600.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 3600.0)
    store = Store(failures=3)
    say(journal, 0)
    sender = started(store)
    assert not sender.drain(patience=0)
    while not store.taken:
        time.sleep(0.01)
    say(journal, 1)
    time.sleep(0.2)
    assert store.taken == [0]


@pytest.mark.parametrize(("busy", "rest"), [(0.001, 1.0), (0.01, 2.0), (0.02, 4.0), (1.0, 10.0)])
def test_sending_takes_half_a_percent_of_a_processor(journal, monkeypatch, busy, rest):
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 1.0)
    clock = iter([0.0, busy])
    monkeypatch.setattr(module.time, "thread_time", lambda: next(clock))
    sender, rests = Sender(journal, Store()), []

    def note(seconds):
        rests.append(seconds)
        sender._stopped = True

    monkeypatch.setattr(sender, "_rest", note)
    sender.run()
    assert rests == [pytest.approx(rest)]


def test_a_stopped_sender_sends_no_more(journal, started):
    store = Store(failures=10**6)
    say(journal, 0)
    sender = started(store)
    assert store.asked.wait(10)
    sender.stop()
    assert not sender.is_alive()
    tried = len(store.requests)
    time.sleep(0.1)
    assert len(store.requests) == tried
    assert not sender.drain(patience=10)  # at once: there is nobody to wait for


def test_a_mark_that_the_disk_does_not_take_holds_up_nothing(journal, started, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlflow_ssl.tracking.journal.os.pwrite", full)
    store = Store()
    say(journal, *range(7))
    assert started(store).drain(patience=10)
    assert store.taken == list(range(7))
