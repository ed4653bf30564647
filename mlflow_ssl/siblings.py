"""What the processes of a training tell each other through the output folder, and what is to be made of it.

Each keeps a small file there that says that it lives, and where it is. The first to fail, or to find that another is
gone or stands still, writes why: that is why all of them end.
"""

import contextlib
import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from mlflow_ssl.errors import InputError, Interrupted, MachineError, ProcessError

FOLDER = "processes"
"""Where an output folder keeps these files, in a folder for each attempt at the training: a process that has survived
an earlier one does not meddle."""


BIRTH_SECONDS = 5.0
"""How much two processes may differ over when a third began: they reckon it by clocks that are set."""


@dataclass(frozen=True)
class State:
    """What a process says of itself.

    Attributes:
        beat: how often it has said something.
        moves: batches that it has begun or ended.
        stepping: whether it is at what all processes do at the same pace: loading a batch, computing a step. Elsewhere
            one may be busy for long while the others wait, with a validation's figures, a picture or a checkpoint.
        waiting: whether it waits for the others.
        idle: seconds for which it has done next to nothing, where it is known what it may wait for.
        limit: seconds that a step of its may take.
        place: where in the program it is.
        ended: whether it has left the training in good order, or has said why.
        host: its machine.
        pid: its number there.
        born: when it began, by the clock there: numbers are given again.
    """

    beat: int = 0
    moves: int = 0
    stepping: bool = False
    waiting: bool = False
    idle: float = 0.0
    limit: float = 0.0
    place: str = ""
    ended: bool = False
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    born: float = field(default_factory=lambda: psutil.Process().create_time())

    @property
    def gone(self) -> bool:
        """Whether it is known not to run any more; not known of another machine's."""
        return self.host == socket.gethostname() and self.running() is None

    def running(self) -> psutil.Process | None:
        """Return the process itself; None if it has ended, or is another machine's."""
        try:
            process = psutil.Process(self.pid)
            same = self.host == socket.gethostname() and abs(process.create_time() - self.born) < BIRTH_SECONDS
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


@dataclass(frozen=True)
class Failure:
    """Why a training ends before its time.

    Attributes:
        process: number of the process that is meant.
        reason: in words.
        signum: the signal, where a user has stopped it; 0 else.
    """

    process: int
    reason: str
    signum: int = 0

    @property
    def status(self) -> str:
        """What becomes of the run."""
        return "KILLED" if self.signum else "FAILED"

    def error(self) -> BaseException:
        """Return what a process raises that has to end for it."""
        return Interrupted(self.signum) if self.signum else ProcessError(self.reason)


class Slips:
    """The files of a training's processes.

    Args:
        folder: where they are; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, process: int, state: State) -> None:
        """Write what a process says of itself, whole or not at all; a full disk is no reason to end."""
        file = self.folder / f"{process}.json"
        scratch = file.with_suffix(".part")
        with contextlib.suppress(OSError):
            scratch.write_text(json.dumps(asdict(state)))
            scratch.replace(file)

    def read(self, process: int) -> State | None:
        """Return what a process has said last; None if it has not begun."""
        try:
            return State(**json.loads((self.folder / f"{process}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def fail(self, failure: Failure) -> Failure:
        """Say why the training ends, unless another process has; return what holds."""
        try:
            with (self.folder / "failure.json").open("x") as file:  # made by one process alone
                file.write(json.dumps(asdict(failure)))
        except OSError:
            return self.failure() or failure
        return failure

    def failure(self) -> Failure | None:
        """Return why the training ends; None while it does not."""
        try:
            return Failure(**json.loads((self.folder / "failure.json").read_text()))
        except (OSError, ValueError, TypeError):  # not there, or being written
            return None


def standing_still(states: Mapping[int, State], seconds: Mapping[int, float]) -> list[int]:
    """Return the processes that all others wait for; none while the training may yet go on.

    Args:
        states: of the processes that have not ended.
        seconds: since each has moved.

    Example:
        >>> ahead = State(moves=5, stepping=True, limit=45, waiting=True)
        >>> behind = State(moves=4, stepping=True, limit=45)
        >>> standing_still({0: ahead, 1: behind}, {0: 46, 1: 47}), standing_still({0: ahead, 1: behind}, {0: 44, 1: 47})
        ([1], [])
    """
    # a step that is slow is so for all; for some alone, while they wait for one that is not at a step yet
    limit = min((state.limit for state in states.values()), default=0.0)
    if not states or min(seconds[process] for process in states) <= limit:
        return []
    idle = {process for process, state in states.items() if state.idle > limit}
    stepping = {process for process, state in states.items() if state.stepping}
    waiting = {process for process, state in states.items() if state.waiting}
    if set(states) - idle - stepping - waiting:  # these may be at something that takes long
        return []
    if not stepping and not idle - waiting and idle != set(states):  # and so may one that only seems to wait
        return []
    suspects = [process for process in states if process not in waiting] or list(states)
    fewest = min(states[process].moves for process in suspects)
    return [process for process in suspects if states[process].moves == fewest]


def still_words(processes: Sequence[int], states: Mapping[int, State], *, seconds: float, world_size: int) -> str:
    """Return what is said of processes that stand still.

    Example:
        >>> still_words([1], {1: State(place="load (data.py:7)")}, seconds=45.2, world_size=2)
        'process 1 of 2 has stood still for 45 s, at load (data.py:7); if it may, raise core.hang_seconds'
    """
    each = [f"process {process} of {world_size}" for process in processes]
    places = ", ".join(dict.fromkeys(states[process].place for process in processes))
    have = "has" if len(each) == 1 else "have"
    return (
        f"{' and '.join(each)} {have} stood still for {seconds:.0f} s, at {places}; if it may, raise core.hang_seconds"
    )


def exit_words(code: int) -> str:
    """Return what is said of a process that has ended without a word of its own.

    Example:
        >>> exit_words(-9), exit_words(7)
        ('was killed (SIGKILL)', 'ended with exit code 7, without a word')
    """
    if code >= 0:
        return f"ended with exit code {code}, without a word"
    return f"was killed ({signal.Signals(-code).name})"


def error_words(error: BaseException) -> str:
    r"""Return an error in one line: a mistake as it is, others with their type; of many lines the first and the last.

    Example:
        >>> error_words(KeyError("a"))
        "KeyError: 'a'"
        >>> error_words(OSError("Caught OSError in worker 0.\nTraceback:\n  ...\nOSError: no disk"))
        'OSError: Caught OSError in worker 0. ... OSError: no disk'
    """
    first, *rest = str(error).strip().splitlines() or [""]
    words = f"{first} ... {rest[-1].strip()}" if rest else first
    known = isinstance(error, InputError | MachineError | Interrupted)
    return words if known else f"{type(error).__name__}: {words}"


LOST_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "store->get")
"""What errors say, in small letters, that follow from another process's end."""


def lost_connection(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came of, is that another process does not answer any more."""
    while error is not None:
        if isinstance(error, RuntimeError | ConnectionError) and any(word in str(error).lower() for word in LOST_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
