"""Whether a process does anything: the processor time that it takes, and whether a file system holds it."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

LEAST_SHARE = 0.01
"""Of a processor core: what takes less does no more than to look now and then whether there is something to do."""


@dataclass(frozen=True)
class Effort:
    """What a process has done by a moment, with those that it has started, as loader workers are.

    Attributes:
        at: the moment, in seconds.
        seconds: of processor time.
        held: whether a file system holds one of them, which may take its time.
    """

    at: float
    seconds: float
    held: bool = False

    def is_little_since(self, earlier: "Effort") -> bool:
        """Return whether next to nothing was done since an earlier moment.

        Example:
            >>> Effort(at=50, seconds=7.1).is_little_since(Effort(at=0, seconds=7.0))
            True
            >>> Effort(at=50, seconds=8.0).is_little_since(Effort(at=0, seconds=7.0))
            False
        """
        return not self.held and self.seconds - earlier.seconds < LEAST_SHARE * (self.at - earlier.at)


class Rest:
    """How long a process has been at rest, from its efforts at one moment after another."""

    def __init__(self) -> None:
        self._efforts: deque[Effort] = deque()

    def seconds(self, effort: Effort) -> float:
        """Return for how long next to nothing has been done, up to the moment of an effort.

        Example:
            >>> rest = Rest()
            >>> [rest.seconds(Effort(at=at, seconds=seconds)) for at, seconds in ((0, 0), (2, 0), (4, 1), (6, 1))]
            [0, 2, 0, 2]
        """
        while self._efforts and not effort.is_little_since(self._efforts[0]):
            self._efforts.popleft()
        self._efforts.append(effort)
        return effort.at - self._efforts[0].at

    def end(self) -> None:
        """Begin anew, as if the process had worked until now."""
        self._efforts.clear()


def effort_of_this_process(thread: int, *, but: Collection[int] = ()) -> Effort:
    """Return what this process has done, without the thread that asks.

    Args:
        thread: the system's number of the one that trains.
        but: numbers of processes that this one has started, which are left out with all that they have started.
    """
    ended = os.times()
    seconds = time.process_time() - time.thread_time() + ended.children_user + ended.children_system
    held = is_held(Path(f"/proc/self/task/{thread}"))
    for child in _descendants(but):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            seconds += times.user + times.system
            held = held or is_held(Path(f"/proc/{child.pid}"))
    return Effort(time.monotonic(), seconds, held)


def _descendants(but: Collection[int]) -> Iterator[psutil.Process]:
    left_out = set(but)
    for child in psutil.Process().children(recursive=True):  # a parent comes before its children
        with contextlib.suppress(psutil.Error):
            if child.pid in left_out or child.ppid() in left_out:
                left_out.add(child.pid)
            else:
                yield child


def is_held(thread: Path) -> bool:
    """Return whether a thread is in a call to a disk or a file system; False where the system does not say.

    A file system in user space lets its callers sleep as any other wait does: it is known by the name of the wait.

    Args:
        thread: its folder below ``/proc``.
    """
    try:
        state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
        wait = (thread / "wchan").read_text()
    except (OSError, IndexError):
        return False
    return state == "D" or "fuse" in wait or wait == "request_wait_answer"
