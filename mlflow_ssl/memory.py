"""What the C library does with the memory that a CPU's tensors leave."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Numbers of ``mallopt``'s options, as malloc.h has them."""


def keep_freed_memory() -> bool:
    """Have this process keep the memory it frees, for the next tensors; return whether that could be had.

    glibc gives the memory of large tensors back to the system as soon as they go, and takes it anew at the next step,
    page by page, each filled with zeros: at 224 px a tenth of a step's processor time. The peak stays what it is.

    References:
        mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
