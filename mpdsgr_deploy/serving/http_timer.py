"""Timers that limit how long a client may be silent."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

READ_FIRST = 0.1  # seconds for reading data that arrived in time while this process was blocked


class ClientTimer:
    """Calls `passed` once the client has been silent for too long.

    A connection has one timer of the event loop, which is set again only when it fires, because every request changes
    the time that is due.
    """

    def __init__(self, passed: Callable[[], None]) -> None:
        self._passed = passed
        self._loop = asyncio.get_running_loop()
        self._due = self._fires = inf  # times on the event loop's clock
        self._handle: asyncio.TimerHandle | None = None

    def expect(self, seconds: float) -> None:
        """Give the client `seconds` from now."""
        self._due = self._loop.time() + seconds
        if self._handle is None or self._fires > self._due:
            self._cancel()
            self._start()

    def rest(self) -> None:
        """Stop waiting for the client for now."""
        self._due = inf

    def end(self) -> None:
        """Call nothing any more, and drop `passed`, which may refer to this timer; the cycle would stay in memory."""
        self._cancel()
        self._passed = _nothing

    def _cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _start(self) -> None:
        self._handle, self._fires = self._loop.call_at(self._due, self._look), self._due

    def _look(self) -> None:
        self._handle = None
        if self._due == inf:
            return
        if self._loop.time() < self._due:
            self._start()
        else:
            self._fires = self._loop.time() + READ_FIRST
            self._handle = self._loop.call_at(self._fires, self._end, self._due)

    def _end(self, due: float) -> None:
        self._handle = None
        if due == self._due:
            self._passed()
        elif self._due < inf:
            self._start()


def _nothing() -> None:
    pass


@contextmanager
def client_time(timeout: asyncio.Timeout, seconds: float) -> Iterator[None]:
    """Let `timeout` expire once the client has had `seconds` within a with block."""
    timer = ClientTimer(lambda: timeout.reschedule(0))
    timer.expect(seconds)
    try:
        yield
    finally:
        timer.end()
