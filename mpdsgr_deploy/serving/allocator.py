"""How the C library's allocator keeps what a server has freed."""

import ctypes
import os
from contextlib import suppress

KIB = 1 << 10
# an option of mallopt(3), the variable of the environment that sets it too, and our value
OPTIONS = (
    (-8, "MALLOC_ARENA_MAX", 2),  # heaps; threads of their own heaps each keep what the largest burst took
    (-3, "MALLOC_MMAP_THRESHOLD_", 128 * KIB),  # bytes from which a block goes back to the system once it is freed;
    (-1, "MALLOC_TRIM_THRESHOLD_", 128 * KIB),  # glibc would raise both as it sees large blocks, up to 32 and 64 MiB
)


def return_freed_memory() -> None:
    """Let this process give back what it frees, so that bursts and reloads leave no memory behind. Before any thread.

    For glibc; other allocators are left as they are, and so is what the environment sets.
    """
    with suppress(AttributeError, OSError, TypeError):  # TypeError: no C library to open, on Windows
        mallopt = ctypes.CDLL(None).mallopt
        for option, variable, value in OPTIONS:
            if variable not in os.environ:
                mallopt(option, value)
