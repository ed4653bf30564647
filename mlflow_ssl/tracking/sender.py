"""Carry a journal to MLflow from a background thread, however often MLflow fails."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import requests
from mlflow.exceptions import MlflowException

from mlflow_ssl.secret import redact
from mlflow_ssl.tracking.journal import Entry, Journal

log = logging.getLogger(__name__)

READ_AT_ONCE = 5000
"""Entries that are read and joined at once: a backlog of an hour becomes a few requests."""
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
"""Seconds between two sendings."""
SHARE = 0.005
"""Share of one processor that sending may take: 10 ms of work are followed by 2 s of rest."""
LONGEST_RETRY = 30.0
"""Seconds between two tries while MLflow does not answer; they double from 0.5."""
REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"})
"""Answers to what was said, which would be the same another time."""
REFUSING_CODES = frozenset({400, 413})
"""The like where a file was sent: wrong, or too large."""

Send = Callable[[Sequence[Entry]], int]
"""Sends the first entries of those it gets, as many as fit one request, and returns how many."""


class Sender(threading.Thread):
    """Send a journal's entries in order: each until it arrives, or is refused for what it says.

    Args:
        journal: what to send.
        send: see `Send`.

    Attributes:
        refused: why entries were refused; they stay in the journal's file.
        trouble: why MLflow cannot be reached; empty while it can.
    """

    def __init__(self, journal: Journal, send: Send) -> None:
        super().__init__(name=f"mlflow-{journal.file.stem}", daemon=True)
        self.journal = journal
        self.refused: list[str] = []
        self.trouble = ""
        self._send = send
        self._changed = threading.Condition()
        self._hurried = self._stopped = False
        self._last_success = time.monotonic()

    def run(self) -> None:
        """Send until stopped."""
        while not self._stopped:
            began = time.thread_time()
            found = self.journal.unsent(READ_AT_ONCE)
            self._deliver([entry for entry, _ in found], [end for _, end in found])
            busy = time.thread_time() - began
            self._rest(min(LONGEST_PAUSE, max(SHORTEST_PAUSE, busy / SHARE)))

    def drain(self, *, patience: float, deadline: float = float("inf")) -> bool:
        """Send what is left without pauses, and return whether all of it has gone.

        Args:
            patience: seconds without any success after which it is given up.
            deadline: `time.monotonic` after which it is given up in any case.
        """
        began = time.monotonic()
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            while self.is_alive() and self.journal.sent < self.journal.written:
                now = time.monotonic()
                if now > min(deadline, max(began, self._last_success) + patience):
                    break
                self._changed.wait(0.1)
            self._hurried = False
        return self.journal.sent == self.journal.written

    def stop(self) -> None:
        """End the thread; a request under way is left to itself."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.join(timeout=1)

    def _deliver(self, entries: Sequence[Entry], ends: Sequence[int]) -> None:
        done = failures = 0
        at_most = tried = len(entries)
        while done < len(entries) and not self._stopped:
            try:
                tried = min(at_most, len(entries) - done)
                done += self._send(entries[done : done + tried])
                failures, at_most = 0, 2 * tried
            except Exception as error:
                if not is_refusal(error):
                    self._note_trouble(error)
                    self._rest(0.5 if self._hurried else min(LONGEST_RETRY, 0.5 * 2**failures))
                    failures += 1
                    continue
                if tried > 1:  # find the one that is meant
                    at_most = tried // 2
                    continue
                self._note_refusal(entries[done], error)
                done += 1
            self._note_success(ends[done - 1] if done else self.journal.sent)

    def _note_success(self, end: int) -> None:
        if self.trouble:
            log.info("MLflow answers again")
            self.trouble = ""
        with self._changed:
            self.journal.mark(end)
            self._last_success = time.monotonic()
            self._changed.notify_all()

    def _note_trouble(self, error: Exception) -> None:
        if not self.trouble:
            folder = self.journal.file.parent
            reason = redact(f"{type(error).__name__}: {error}".splitlines()[0])[:160]
            log.warning("MLflow does not take what it is sent; it is kept in %s and sent again (%s)", folder, reason)
            self.trouble = reason

    def _note_refusal(self, entry: Entry, error: Exception) -> None:
        reason = redact(str(error).splitlines()[0])[:300]
        log.warning("MLflow refuses one of the %s: %s", entry["kind"], reason)
        self.refused.append(reason)

    def _rest(self, seconds: float) -> None:
        with self._changed:
            if not self._stopped and not (self._hurried and not self.trouble):
                self._changed.wait(seconds)


def is_refusal(error: Exception) -> bool:
    """Return whether MLflow answered that it does not want what it was sent."""
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code in REFUSING_CODES
    return isinstance(error, MlflowException) and error.error_code in REFUSALS
