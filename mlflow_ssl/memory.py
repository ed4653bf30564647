"""What the C library does with the memory that a CPU's tensors leave."""

import ctypes
import functools
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Numbers of ``mallopt``'s options, as malloc.h has them."""


@functools.cache
def keep_freed_memory() -> bool:
    """Have this process keep the memory it frees, for the next tensors; return whether that could be had.

    glibc gives the memory of large tensors back to the system as soon as they go, and takes it anew at the next step,
    page by page, each filled with zeros. Before a process is forked, as loader workers are, what is free is given back
    after all: the child would hold it for as long as it lives.

    References:
        mallopt(3), malloc_trim(3).
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)  # musl has none
    if mallopt is None or not (mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1)):
        return False
    os.register_at_fork(before=lambda: library.malloc_trim(0))
    return True
