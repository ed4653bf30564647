"""What makes a training start sooner."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

Result = TypeVar("Result")


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Look for no cyclic garbage until `collect_again` or the end.

    Six thousand modules are imported and stay. To search them for garbage again and again as they come takes a fifth of
    the time that importing them does.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def collect_again() -> None:
    """End the rest: a training makes garbage that holds memory of the device."""
    gc.enable()


class Ahead(Generic[Result]):
    """A call that a thread makes while the caller goes on.

    Where the program ends before the call does, it is abandoned: a mistake found elsewhere is said at once. So the call
    must leave nothing half done.

    Args:
        function: to be called, without arguments.
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._future: Future[Result] = Future()
        threading.Thread(target=self._call, name="ahead", daemon=True).start()

    def _call(self) -> None:
        try:
            self._future.set_result(self._function())
        except BaseException as error:
            self._future.set_exception(error)

    def result(self) -> Result:
        """Wait for the call to end, and return or raise what it does."""
        return self._future.result()

    def glance(self, seconds: float) -> None:
        """Wait a moment, and raise what the call raises if it has ended by then."""
        if wait([self._future], timeout=seconds).done:
            self._future.result()
