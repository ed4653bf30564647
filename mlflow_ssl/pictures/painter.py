"""Drawing beside the training."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

log = logging.getLogger(__name__)


class Painter:
    """One thread that draws while the training goes on. What fails there is said once and ends nothing."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
        self._jobs: list[Future[None]] = []
        self._failed = False

    @property
    def waiting(self) -> int:
        """Number of pictures that are not drawn yet."""
        self._jobs = [job for job in self._jobs if not job.done()]
        return len(self._jobs)

    def paint(self, draw: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Have ``draw`` called when what was asked for earlier is done; it may raise ``CancelledError`` to stop."""

        def forgivingly() -> None:
            with self.forgiving():
                draw(*args, **kwargs)

        self._jobs.append(self._pool.submit(forgivingly))

    @contextlib.contextmanager
    def forgiving(self) -> Iterator[None]:
        """Turn an error within into a line of the log: a warning the first time."""
        try:
            yield
        except CancelledError:
            return
        except Exception as error:
            level = logging.DEBUG if self._failed else logging.WARNING
            self._failed = True
            log.log(level, "a picture could not be drawn: %s: %s", type(error).__name__, error)
            log.debug("in:", exc_info=True)

    def finish(self) -> None:
        """Wait until everything is drawn."""
        wait(self._jobs)

    def give_up(self, seconds: float) -> None:
        """Drop what has not been begun, and wait ``seconds`` at most for what has."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait(self._jobs, timeout=seconds)
