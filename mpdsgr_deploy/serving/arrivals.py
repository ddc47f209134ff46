"""Limit how many gRPC messages arrive at a time, because none can be read or refused before it is complete."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from mpdsgr_deploy.serving.errors import Refused, Why
from mpdsgr_deploy.serving.http_timer import READ_FIRST, client_time

PATIENCE = 1.0  # seconds within which a message that waits gets a place
Content = TypeVar("Content")


class Arrivals:
    """Lets `places` messages arrive at once, so that together they fit into the memory reserved for them.

    At most `waiting` others wait for a place. While any wait, the time for an arrival is short enough that all get a
    place within about PATIENCE, so that clients who send slowly, or nothing, delay nobody for longer.
    """

    def __init__(self, places: int, waiting: int) -> None:
        self.places, self.most_waiting = places, waiting
        self._arriving: dict[asyncio.Timeout, float] = {}  # when each began, the oldest first
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._places_used = 0
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, receive: Callable[[], Awaitable[Content]], seconds: float) -> Content:
        """Return the result of `receive`. Raises Refused after `seconds`, or if too many messages wait."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as timeout:
                with client_time(timeout, seconds):
                    await self._enter()
                    self._arriving[timeout] = loop.time()
                    try:
                        if self._waiting and self._timer is None:
                            self._hurry()
                        return await receive()
                    finally:
                        self._arriving.pop(timeout, None)
                        self._leave()
        except TimeoutError:
            raise Refused(Why.SLOW, "the message did not arrive in time") from None

    async def _enter(self) -> None:
        if self._places_used < self.places and not self._waiting:
            self._places_used += 1
            return
        if len(self._waiting) >= self.most_waiting:
            raise Refused(Why.BUSY, "too many messages are on their way; try again soon")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if self._timer is None:
            self._hurry()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given a place in the same moment
                self._leave()
            with suppress(ValueError):
                self._waiting.remove(turn)
            raise

    def _leave(self) -> None:
        """Hand the place to the message that has waited longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._places_used -= 1

    def _hurry(self) -> None:
        """End the oldest arrivals whose time is over, as many as messages wait, and check again at the next one's."""
        self._timer = None
        loop = asyncio.get_running_loop()
        now, needed = loop.time(), len(self._waiting)
        patience = PATIENCE / (1 + needed / self.places)
        for timeout, began in list(self._arriving.items()):
            if not needed:
                break
            if now - began < patience:
                self._timer = loop.call_later(began + patience - now + 0.001, self._hurry)
                break
            del self._arriving[timeout]
            timeout.reschedule(now + READ_FIRST)
            needed -= 1
        if self._timer is None and needed:
            self._timer = loop.call_later(patience, self._hurry)
