"""An HTTP request whose head has arrived and whose body may still arrive."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from mpdsgr_deploy.serving.errors import Refused, Why
from mpdsgr_deploy.serving.http_wire import CONTINUE

BODY_BYTES = 1 << 16  # of a body that may wait to be read before the client has to


class Wire(Protocol):
    """The interface of a connection that a request needs."""

    def write(self, data: bytes) -> None:
        """Send bytes before the answer."""

    def read_on(self) -> None:
        """Read more of what the client sends."""


class Head(NamedTuple):
    """A request's head. path: decoded; headers: by name in lower case; keep_alive: another request may follow."""

    method: str
    path: str
    headers: Mapping[str, str]
    keep_alive: bool


class IncomingRequest:
    """A request whose head has arrived, with the part of its body that has arrived and is not read yet."""

    __slots__ = (
        *("_arrived", "_connection", "_left", "_size", "_waiter"),
        *("complete", "expects", "gone", "head", "start"),
    )

    def __init__(self, connection: Wire, head: Head) -> None:
        self._connection, self.head, self.start = connection, head, time.monotonic()
        self.expects = head.headers.get("expect", "").lower() == "100-continue"
        self._arrived: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._left: Callable[[], None] | None = None
        self.complete = self.gone = False

    @property
    def at_end(self) -> bool:
        """Whether all of the body was read."""
        return self.complete and not self._arrived

    @property
    def full(self) -> bool:
        """Whether no more of the body should be received yet."""
        return self._size > BODY_BYTES

    def feed(self, part: bytes) -> None:
        self._arrived.append(part)
        self._size += len(part)
        self._wake()

    def finish(self) -> None:
        """Mark the body as complete."""
        self.complete = True
        self._wake()

    def leave(self) -> None:
        """Note that the client has disconnected."""
        self.gone = True
        self._wake()
        if self._left is not None:
            self._left()

    async def read(self) -> bytes:
        if self.expects and not self._arrived:
            self._connection.write(CONTINUE)
            self.expects = False
        while not self._arrived and not self.complete:
            if self.gone:
                raise Refused(Why.CANCELLED, "the client left before its body was there")
            await self._wait()
        part = self._arrived[0] if len(self._arrived) == 1 else b"".join(self._arrived)
        self._arrived.clear()
        self._size = 0
        self._connection.read_on()
        return part

    def watch(self, left: Callable[[], None] | None) -> None:
        self._left = left
        if self.gone and left is not None:
            left()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
