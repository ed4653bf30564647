"""Ctrl-C and SIGTERM: they end the program where it stands, or a training at its next step."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from mlflow_ssl.errors import Interrupted

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
"""How long a training may take to its next step: the machine may be gone after 30 s."""
STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """What signals do: raise `Interrupted` where the program stands, or, where told so, wait to be asked for."""

    def __init__(self) -> None:
        self._waiting_allowed = False
        self._ignored = False
        self._received: int | None = None

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Handle the signals while the context lasts."""
        if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
            yield
            return
        before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGALRM)}
        self._received = None
        self._ignored = False
        self.install()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Put our handlers in place; Lightning puts its own before them, which end the training mid-step."""
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPPING, signal.SIGALRM):
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Let a signal wait until the training asks for it, for at most `GRACE_SECONDS`; a second one does not wait."""
        self._waiting_allowed = True
        try:
            yield
        finally:
            self._waiting_allowed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self._received is not None:
            raise Interrupted(self._received)

    def ignore(self) -> None:
        """Take no notice of any more signals: the program is ending for another reason; any thread may say so."""
        self._ignored = True

    def received(self) -> int | None:
        """Return the signal that waits."""
        return self._received

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self._ignored:
            return
        if self._waiting_allowed and self._received is None and signum != signal.SIGALRM:
            self._received = signum
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
            log.warning("%s: the training is saved at its next step, then it ends", signal.Signals(signum).name)
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interrupted(self._received or signum)


stop_signals = StopSignals()
"""The program's own; handlers of signals are one thing a process."""
