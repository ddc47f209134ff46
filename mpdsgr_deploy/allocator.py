"""How much freed memory glibc's malloc keeps for reuse. The C libraries of other systems are left as they are."""

import asyncio
import ctypes
import os
from collections.abc import Callable
from contextlib import suppress

# options of mallopt(3), and the variables of the environment that set them too
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -2, -3, -4, -8
VARIABLES = {
    ARENA_MAX: "MALLOC_ARENA_MAX",
    MMAP_THRESHOLD: "MALLOC_MMAP_THRESHOLD_",
    TRIM_THRESHOLD: "MALLOC_TRIM_THRESHOLD_",
}
MIB = 1 << 20
# A training step asks for the same blocks again. Handed back to the system, each of their pages would have to be mapped
# and cleared anew, which takes a large part of a step on a CPU. All blocks come from one heap, since the backward pass
# has a thread of its own.
TRAINING = {MMAP_MAX: 0, ARENA_MAX: 1, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**28}
SERVING = {
    ARENA_MAX: 2,  # with a heap per thread, each keeps the memory of its largest burst
    # bytes from which a block goes back to the system once it is freed, and free ones at the end of a heap; glibc would
    # raise both as it sees large blocks, up to 32 and 64 MiB, and much smaller ones cost CPU for every batch
    MMAP_THRESHOLD: MIB,
    TRIM_THRESHOLD: 8 * MIB,
}
TRIM_EVERY = 60.0  # seconds


def keep_pages() -> None:
    """Let malloc keep large freed blocks for reuse, for as long as this process lives."""
    if (mallopt := _function("mallopt")) is not None:
        for option, value in TRAINING.items():
            mallopt(option, value)


def limit_free_memory() -> None:
    """Let malloc return most memory after a burst. Call it before any thread starts; environment settings win."""
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
