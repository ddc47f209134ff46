"""How much of what a server has freed the C library keeps: glibc's malloc; others are left as they are."""

import asyncio
import ctypes
import os
from collections.abc import Callable
from contextlib import suppress

MIB = 1 << 20
# an option of mallopt(3), the variable of the environment that sets it too, and our value
OPTIONS = (
    (-8, "MALLOC_ARENA_MAX", 2),  # heaps; where each thread has its own, each keeps what its largest burst took
    # bytes from which a block goes back to the system once it is freed, and free ones at the end of a heap; glibc would
    # raise both as it sees large blocks, up to 32 and 64 MiB, and much smaller ones cost CPU for every batch
    (-3, "MALLOC_MMAP_THRESHOLD_", MIB),
    (-1, "MALLOC_TRIM_THRESHOLD_", 8 * MIB),
)
TRIM_EVERY = 60.0  # seconds


def limit_free_memory() -> None:
    """Let malloc keep little of what a burst took. Before any thread; what the environment sets stays as it is."""
    if (mallopt := _function("mallopt")) is not None:
        for option, variable, value in OPTIONS:
            if variable not in os.environ:
                mallopt(option, value)


async def return_free_pages() -> None:
    """Let malloc return the free pages within its heaps to the system, again and again, until this is cancelled."""
    trim = _function("malloc_trim")
    while trim is not None:
        await asyncio.sleep(TRIM_EVERY)
        await asyncio.to_thread(trim, 0)


def _function(name: str) -> Callable[..., int] | None:
    with suppress(AttributeError, OSError, TypeError):  # TypeError: there is no C library to open, on Windows
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
        return function
    return None
