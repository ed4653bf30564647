"""How far a preparation is: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)

EVERY_SECONDS = 10.0
"""Time between two lines where there is no terminal."""


class Counting:
    """Show how many of how many are done, from a second on: what is quicker says nothing.

    Args:
        doing: what is done, such as ``scanning``.
        what: what is counted, such as ``files``.
        total: how many there are; None where that is not known.
    """

    def __init__(self, doing: str, what: str, total: int | None = None) -> None:
        self.doing = doing
        self.what = what
        self.total = total
        self.done = 0
        self._bar: Progress | None = None
        self._began = self._shown = time.monotonic()

    def __enter__(self) -> "Counting":
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Count some more."""
        self.done += count
        now = time.monotonic()
        if sys.stderr.isatty():
            if now - self._shown > (0.1 if self._bar else 1.0):
                self._shown = now
                self._draw()
        elif now - self._shown > EVERY_SECONDS:
            self._shown = now
            of_total = f" of {self.total:,}" if self.total is not None else ""
            log.info("%s: %s%s %s in %.0f s", self.doing, f"{self.done:,}", of_total, self.what, now - self._began)

    def _draw(self) -> None:
        if self._bar is None:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.what),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self.doing, total=self.total)
        self._bar.update(self._bar.task_ids[0], completed=self.done)
