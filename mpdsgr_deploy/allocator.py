"""Set how much freed memory glibc's malloc keeps for reuse. Other C libraries are left as they are."""

import asyncio
import ctypes
import os
from collections.abc import Callable
from contextlib import suppress

# options of mallopt(3), and the environment variables that also set them
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -2, -3, -4, -8
VARIABLES = {
    ARENA_MAX: "MALLOC_ARENA_MAX",
    MMAP_THRESHOLD: "MALLOC_MMAP_THRESHOLD_",
    TRIM_THRESHOLD: "MALLOC_TRIM_THRESHOLD_",
}
MIB = 1 << 20
# Every training step allocates the same blocks again. If they went back to the system in between, it would have to map
# and clear each of their pages anew, which takes a large part of a step on a CPU. All threads allocate from one heap,
# so that each can reuse what another has freed.
TRAINING = {MMAP_MAX: 0, ARENA_MAX: 1, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**28}
SERVING = {
    ARENA_MAX: 2,  # with a heap per thread, each heap would keep the memory of its largest burst
    # sizes in bytes from which a freed block, and the free end of a heap, go back to the system; glibc would raise them
    # to 32 and 64 MiB once it sees large blocks, and much smaller values cost CPU time for every batch
    MMAP_THRESHOLD: MIB,
    TRIM_THRESHOLD: 8 * MIB,
}
TRIM_EVERY = 60.0  # seconds


def keep_pages() -> None:
    """Let malloc keep large freed blocks for reuse until this process ends."""
    if (mallopt := _function("mallopt")) is not None:
        for option, value in TRAINING.items():
            mallopt(option, value)


def limit_free_memory() -> None:
    """Let malloc return most of the memory that it frees after a burst. Call this before any thread starts.

    Settings in environment variables take precedence.
    """
    if (mallopt := _function("mallopt")) is not None:
        for option, value in SERVING.items():
            if VARIABLES[option] not in os.environ:
                mallopt(option, value)


async def return_free_pages() -> None:
    """Return the free pages within malloc's heaps to the system periodically, until this task is cancelled."""
    trim = _function("malloc_trim")
    while trim is not None:
        await asyncio.sleep(TRIM_EVERY)
        await asyncio.to_thread(trim, 0)


def _function(name: str) -> Callable[..., int] | None:
    with suppress(AttributeError, OSError, TypeError):  # TypeError: there is no C library to open, on Windows
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
        return function
    return None
