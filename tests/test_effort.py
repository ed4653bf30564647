"""What a process has done."""

import subprocess
import sys
import threading
import time

import pytest

from mlflow_ssl.effort import Effort, Rest, effort_of_this_process, is_held

SPINNING = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"


def effort(**options):
    return effort_of_this_process(threading.get_native_id(), **options)


@pytest.fixture
def child():
    """Return a process that has computed, and waits."""
    with subprocess.Popen([sys.executable, "-c", SPINNING], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.stdin.close()


def test_what_others_have_computed_for_a_process_counts_unless_they_are_left_out(child):
    assert effort().seconds - effort(but=[child.pid]).seconds > 0.25


def test_the_thread_that_asks_does_not_count():
    before, until = effort(), time.thread_time() + 0.3
    while time.thread_time() < until:
        pass
    assert effort().seconds - before.seconds < 0.1


@pytest.mark.parametrize(
    ("state", "wait", "held"),
    [("S", "futex_wait_queue", False), ("S", "request_wait_answer", True), ("S", "fuse_flush", True), ("D", "0", True)],
)
def test_a_thread_is_held_by_a_disk_or_by_a_file_system_in_user_space(tmp_path, state, wait, held):
    (tmp_path / "stat").write_text(f"7 (a (b) c) {state} 1 7 7 0")
    (tmp_path / "wchan").write_text(wait)
    assert is_held(tmp_path) is held


def test_a_thread_that_is_not_there_is_not_held(tmp_path):
    assert not is_held(tmp_path)


def test_a_process_that_a_file_system_holds_is_not_at_rest():
    rest = Rest()
    held = (False, False, True, False, False)
    found = [rest.seconds(Effort(at=at, seconds=0.0, held=each)) for at, each in enumerate(held)]
    assert found == [0, 1, 0, 1, 2]


def test_a_little_now_and_then_is_rest_and_much_at_once_ends_it():
    rest = Rest()
    assert [rest.seconds(Effort(at=10.0 * n, seconds=0.05 * n)) for n in range(6)][-1] == 50
    assert rest.seconds(Effort(at=60.0, seconds=2.0)) == 0
