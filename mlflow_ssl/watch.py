"""The processes of a training watch each other: where one dies, hangs or raises, all end, and say why.

Torch would have the others wait for half an hour, and then name a socket. A thread in each process says that it lives,
and reads what the others say; the first process reads all of them, and the others read the first. When the training is
to end, a process gets `GRACE_SECONDS` to come to an end by itself, as it does where the connection breaks. Then the
thread ends it: the process may be in a call that never returns.
"""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from mlflow_ssl.effort import Rest, effort_of_this_process
from mlflow_ssl.errors import InputError, Interrupted, MachineError, ProcessError
from mlflow_ssl.place import place_of
from mlflow_ssl.siblings import (
    Failure,
    Slips,
    State,
    error_words,
    exit_words,
    lost_connection,
    standing_still,
    still_words,
)
from mlflow_ssl.signals import stop_signals

log = logging.getLogger(__name__)

LONGEST_BEAT = 2.0
"""Seconds between two words of a process."""
GRACE_SECONDS = 5.0
"""How long a process may take to end by itself when another has failed."""
SEARCH_SECONDS = 10.0
"""How long a process whose connection broke looks for the one that broke it."""
LEAVING_SECONDS = 45.0
"""How long a process other than the first may take to leave after an error."""
SLOW_FACTOR = 5
"""A step may take so many times as long as the longest of the last, however short `core.hang_seconds` is."""
RECENT = 100
"""How many of the last steps, and of the waits for batches between them, that is."""

End = Callable[[Failure], None]
"""Ends the run in MLflow."""


def do_nothing(_: Failure) -> None:
    """End no run."""


class Watch:
    """What this process knows of the others; see `over` and `begin`.

    Attributes:
        children: the processes that this one has started, by their numbers.
        end_run: ends the run, from any thread; only the first process has one.
        end_lost_run: the same where the first process is gone, for any other.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.end_run: End = do_nothing
        self.end_lost_run: End = do_nothing
        self._folder = Path()
        self._seconds = float("inf")

    @contextlib.contextmanager
    def over(
        self, folder: Path, *, seconds: float | None, ends: tuple[End, End] = (do_nothing, do_nothing)
    ) -> Iterator[None]:
        """Watch the training in the context, once it is known to have several processes.

        Args:
            folder: where they tell each other; all of them see it.
            seconds: how long one may stand still or be silent; None for ever.
            ends: `end_run` and `end_lost_run`.

        Raises:
            ProcessError: where this one ends because of another.
            Interrupted: where another was told to stop.
        """
        self._folder, self._seconds = folder, seconds or float("inf")
        self.end_run, self.end_lost_run = ends
        self.children = {}
        try:
            yield
        except BaseException as error:
            failure = self.leave(error)
            self._finish(failed=True)
            if failure is None or (failure.signum and isinstance(error, Interrupted)):
                raise
            raise failure.error() from error
        self._finish(failed=False)

    def begin(self, process: int, world_size: int) -> None:
        """Begin to watch: this is a process of several."""
        if self._thread is not None or world_size < 2:
            return
        self.process, self.world_size = process, world_size
        self._slips = Slips(self._folder)
        self._main, self._main_number = threading.get_ident(), threading.get_native_id()
        self._leaving = threading.Lock()
        self._closed = threading.Event()
        self._ended = False
        self._left_at: float | None = None
        self._caused: Failure | None = None
        self._noticed: Failure | None = None
        self._noticed_at = 0.0
        self._moves, self._moved_at, self._stepping, self._timed = 0, time.monotonic(), False, False
        self._durations: deque[float] = deque([0.0], maxlen=RECENT)
        self._rest, self._idle = Rest(), 0.0
        self._beats = 0
        self._seen: dict[int, _Seen] = {}
        self._beat_seconds = min(LONGEST_BEAT, self._seconds / 20)
        self._say()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    # what the main thread says

    def move(self, *, stepping: bool, timed: bool = True) -> None:
        """Say that the training goes on.

        Args:
            stepping: whether what comes next is done by all processes at the same pace; see `State`.
            timed: whether it is a step, or the loading of a batch: how long those take says how long one may.

        Raises:
            ProcessError: if it does not.
            Interrupted: if another process was told to stop.
        """
        if self._thread is None:
            return
        if self._noticed is not None:
            raise self._noticed.error()
        now = time.monotonic()
        if self._timed:
            self._durations.append(now - self._moved_at)
        self._moves, self._moved_at, self._stepping, self._timed = self._moves + 1, now, stepping, timed

    def depart(self) -> None:
        """Have this process end as it is about to, whatever becomes of the others."""
        if self._thread is None or self._left_at is not None:
            return
        self._leaving.acquire()  # for good; if the thread has it, it is ending the process
        self._left_at = time.monotonic()

    def leave(self, error: BaseException) -> Failure | None:
        """Have the others end too, as this process does for an error.

        Returns:
            What ended the training before: the error comes of that alone. None where it is this one's own.
        """
        if self._thread is None:
            return None
        if self._left_at is None:
            stop_signals.ignore()  # a launcher sends them to those that are left
            self.depart()
            self._caused = self._cause(error)
        return self._caused

    def _cause(self, error: BaseException) -> Failure | None:
        words, number = error_words(error), f"process {self.process} of {self.world_size}"
        if isinstance(error, ProcessError) or lost_connection(error):
            own = Failure(self.process, f"{number} lost the connection to the others: {words}")
            return self._search(SEARCH_SECONDS) or self._slips.fail(own)
        if isinstance(error, Interrupted | KeyboardInterrupt):
            own = Failure(self.process, words, signum=int(getattr(error, "exit_code", 130)) - 128)
            failure = self._search(0) or self._slips.fail(own)
            return failure if failure is not own else None
        if self.process and not isinstance(error, InputError | MachineError):
            log.error("%s: %s", number, words, exc_info=error)
        self._slips.fail(Failure(self.process, f"{number}: {words}" if self.process else words))
        return None

    def _search(self, seconds: float) -> Failure | None:
        """Return which process failed first; look for it for a while, and as long as one seems to be gone."""
        began = time.monotonic()
        while True:
            failure = self._slips.failure() or self._find_lost(range(self.world_size))
            passed = time.monotonic() - began
            missing = passed < SEARCH_SECONDS and any(seen.state.gone for seen in self._running())
            if failure is not None or (passed >= seconds and not missing):
                return failure
            time.sleep(0.1)

    def _finish(self, *, failed: bool) -> None:
        """Say that this process has left, and see the processes that it has started to their end."""
        if self._thread is None:
            return
        self.depart()
        if self.process == 0 or not failed:  # another's thread sees to it that it really ends
            self._closed.set()
            self._thread.join(timeout=5)
        self._ended = True
        self._say()
        caused, self._thread = self._caused, None
        if failed and self.process and caused is not None and caused.process == 0:
            self.end_lost_run(caused)
        for child in self.children.values() if failed else ():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=2 * GRACE_SECONDS)
            child.kill()
            child.wait()

    # what the thread does

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._beat_seconds):
            now = time.monotonic()
            if now - last > 5 * self._beat_seconds:  # this process was stopped, as all of them are by Ctrl-Z
                self._forgive(now)
            last = now
            try:
                self._idle = self._measure_idleness()
                self._say()
                failure = self._slips.failure() or self._find()
                if failure is not None:
                    self._see_to_the_end(failure, now)
            except Exception:  # to fall silent would end the training
                log.exception("the other processes cannot be watched")

    def _find(self) -> Failure | None:
        others = range(1, self.world_size) if self.process == 0 else [0]
        return self._find_lost(others) or (self._find_still() if self.process == 0 else None)

    def _find_lost(self, processes: "range | list[int]") -> Failure | None:
        """Return the failure of a process that is gone or silent, once that is sure."""
        for process in processes:
            if process == self.process:
                continue
            seen = self._look(process)
            words = self._lost_words(process, seen)
            if words is None:
                continue
            said = Failure(process, f"process {process} of {self.world_size} {words}")
            failure = self._slips.fail(said)
            running = seen.state.running() if seen is not None and failure is said else None
            if running is not None:  # silent, and no other signal reaches one that is stopped
                running.kill()
            return failure
        return None

    def _look(self, process: int) -> "_Seen | None":
        state, now = self._slips.read(process), time.monotonic()
        before = self._seen.get(process)
        if state is None:
            return before
        if before is None:
            before = self._seen[process] = _Seen(state, now, now)
        if state.beat != before.state.beat:
            before.heard_at = now
        if state.moves != before.state.moves:
            before.moved_at = now
        before.state = state
        return before

    def _lost_words(self, process: int, seen: "_Seen | None") -> str | None:
        if seen is not None and seen.state.ended:
            return None
        code = self.children[process].poll() if process in self.children else None
        if code is not None:
            return exit_words(code)
        if seen is None:
            return None
        silence = time.monotonic() - seen.heard_at
        if silence > self._seconds:
            host = seen.state.host
            return f"has not been heard of for {silence:.0f} s: it is stopped, or {host} or the network is down"
        if silence > 3 * self._beat_seconds and seen.state.gone:
            return "ended without a word, as when the system kills one for want of memory"
        return None

    def _find_still(self) -> Failure | None:
        now = time.monotonic()
        seen = {self.process: _Seen(self._state(), now, self._moved_at)}
        seen |= {process: each for process, each in list(self._seen.items()) if not each.state.ended}
        if len(self._seen) + 1 < self.world_size or len(seen) < 2:  # some have not begun, or nobody waits
            return None
        states = {process: each.state for process, each in seen.items()}
        seconds = {process: now - each.moved_at for process, each in seen.items()}
        still = standing_still(states, seconds)
        if not still:
            return None
        least = min(seconds[process] if states[process].stepping else states[process].idle for process in still)
        words = still_words(still, states, seconds=least, world_size=self.world_size)
        return self._slips.fail(Failure(still[0], words))

    def _running(self) -> "list[_Seen]":
        return [seen for process, seen in list(self._seen.items()) if process != self.process and not seen.state.ended]

    def _forgive(self, now: float) -> None:
        self._moved_at = now
        self._rest.end()
        for seen in list(self._seen.values()):
            seen.heard_at = seen.moved_at = now

    def _see_to_the_end(self, failure: Failure, now: float) -> None:
        if self._noticed is None:
            self._noticed, self._noticed_at = failure, now
        if self._left_at is not None:  # the first is ending the run, and takes its time
            if self.process and now - self._left_at > LEAVING_SECONDS:
                self._exit(failure)
        elif now - self._noticed_at > GRACE_SECONDS and self._leaving.acquire(blocking=False):
            stop_signals.ignore()
            try:
                self._end(failure)
            finally:
                self._exit(failure)

    def _end(self, failure: Failure) -> None:
        log.debug("the main thread is stuck at %s", self._state().place)
        self._ended = True
        self._say()
        if self.process == 0:
            self.end_run(failure)
            sys.stderr.write(f"{'' if failure.signum else 'error: '}{failure.reason}\n")
        elif failure.process == 0:
            self.end_lost_run(failure)

    def _exit(self, failure: Failure) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(128 + failure.signum if failure.signum else 1)

    def _say(self) -> None:
        self._beats += 1
        self._slips.write(self.process, self._state())

    def _measure_idleness(self) -> float:
        """Return for how long this process has done nothing, outside the steps and where nothing takes its time.

        While a training is prepared, a process may wait for much that is not known here.
        """
        place = place_of(self._main)
        prepared, leaving = self._moves > 0, self._left_at is not None
        if not prepared or leaving or self._stepping or place.compiling or place.asking:
            self._rest.end()
            return 0.0
        started = [child.pid for child in self.children.values()]
        return self._rest.seconds(effort_of_this_process(self._main_number, but=started))

    def _state(self) -> State:
        place = place_of(self._main)
        return State(
            beat=self._beats,
            moves=self._moves,
            stepping=self._stepping and not place.compiling,
            waiting=place.waiting,
            idle=self._idle,
            limit=max(self._seconds, SLOW_FACTOR * max(list(self._durations))),
            place=place.words,
            ended=self._ended,
        )


class _Seen:
    """A process as another sees it: what it said last, when it was heard and had moved, by the other's clock."""

    def __init__(self, state: State, heard_at: float, moved_at: float) -> None:
        self.state, self.heard_at, self.moved_at = state, heard_at, moved_at


watch = Watch()
"""The program's own: it has one main thread."""
