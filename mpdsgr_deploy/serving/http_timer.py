"""The time that a client may take."""

import asyncio
from collections.abc import Callable
from math import inf


class ClientTimer:
    """Calls `passed` once the client has been silent for too long.

    One timer of the event loop serves a connection and is moved on when it fires, as every request sets it anew.
    """

    def __init__(self, passed: Callable[[], None]) -> None:
        self._passed = passed
        self._loop = asyncio.get_running_loop()
        self._due = self._fires = inf  # on the loop's clock
        self._handle: asyncio.TimerHandle | None = None

    def expect(self, seconds: float) -> None:
        """Give the client so many seconds from now."""
        self._due = self._loop.time() + seconds
        if self._handle is None or self._fires > self._due:
            self.cancel()
            self._start()

    def rest(self) -> None:
        """Expect nothing of the client for now."""
        self._due = inf

    def cancel(self) -> None:
        """End the timer: the connection is gone."""
        if self._handle is not None:
            self._handle.cancel()

    def _start(self) -> None:
        self._handle, self._fires = self._loop.call_at(self._due, self._look), self._due

    def _look(self) -> None:
        self._handle = None
        if self._due == inf:
            return
        if self._loop.time() < self._due:
            self._start()
        else:
            self._passed()
