"""Many small calls, one after another or side by side."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

THREADS = 32
"""For waiting, not for computing: a network file system answers many questions in the time of one."""

AHEAD = 64
"""Calls that may be under way or done and not yet asked for; bounds the memory."""


def side_by_side(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int | None = None
) -> Iterator[_Result]:
    """Yield the function's results in order, its calls made in threads.

    Args:
        function: to be called with each item.
        items: taken as they are needed.
        threads: by default as many as suit a function that computes.
    """
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def side_by_side_if_slow(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, slow_seconds: float
) -> Iterator[_Result]:
    """Yield the function's results in order; threads take over when calls keep waiting longer than ``slow_seconds``.

    Where nothing waits, as on a local disk whose folders are in memory, threads only fight for the interpreter: they
    make a scan twice as slow.
    """
    left = iter(items)
    waits: deque[float] = deque(maxlen=3)  # of the last calls: a machine with other work hesitates now and then
    for item in left:
        began, computed = time.perf_counter(), time.thread_time()
        result = function(item)
        waits.append(time.perf_counter() - began - (time.thread_time() - computed))
        yield result
        if len(waits) == waits.maxlen and min(waits) > slow_seconds:
            yield from side_by_side(function, left, threads=THREADS)
