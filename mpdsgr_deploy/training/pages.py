"""Keeps freed memory in the process, because every training step asks for the same blocks."""

import ctypes
from contextlib import suppress

# of glibc's mallopt, see malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


def keep_pages() -> None:
    """Tell glibc not to hand large blocks back to the system, for as long as this process lives.

    Handed back, each of their pages has to be mapped and cleared anew when a layer asks for the block in the next step,
    which takes a large part of a step on a CPU. All blocks come from one heap then, since the backward pass has a
    thread of its own. Without glibc (macOS, musl) nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((MMAP_MAX, 0), (ARENA_MAX, 1), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**28)):
            mallopt(parameter, value)
