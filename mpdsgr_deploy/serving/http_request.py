"""An HTTP/1.1 request whose head has arrived and whose body may still arrive, and the encoding of answers."""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import unquote

import httptools

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.http import Reply, refusal_reply, response_headers
from mpdsgr_deploy.serving.refusals import Refused, Why

UPGRADE = re.compile(rb"(?i)\r\nupgrade:")
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HEAD_BYTES = 1 << 16  # the largest number of bytes of a request line and its headers, or of trailers

# answers to input that never becomes a request
BAD = Refused(Why.INVALID, "this is not an HTTP/1.1 request")
SLOW = Refused(Why.SLOW, "the request's head did not arrive in time")
TOO_LONG = Refused(Why.HEADERS, f"the head of a request may have at most {HEAD_BYTES} bytes")
PIPELINE_FULL = Refused(Why.BUSY, "too many requests are waiting on this connection; try again later")
BUSY = Refused(Why.BUSY, "too many connections are open; try again later")
BODY_BYTES = 1 << 16  # bytes of a body that may be buffered before the client has to wait


def encode_reply(reply: Reply, request_id: str, *, keep_alive: bool, with_body: bool = True) -> bytes:
    """Encode a whole response. keep_alive: the connection stays open; with_body: False for the method HEAD."""
    parts = [STATUS_LINES.get(reply.status) or b"HTTP/1.1 %d Closed\r\n" % reply.status]
    for name, value in response_headers(request_id, reply):
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
    if with_body:
        parts.append(reply.body)
    return b"".join(parts)


def refusal(server: Server, error: Refused) -> bytes:
    """Return the whole response to input that never became a request, and count it."""
    server.other_codes["http", str(error.why.status)] += 1
    return encode_reply(refusal_reply(error), server.new_id(), keep_alive=False)


@lru_cache(maxsize=1024)
def url_path(url: bytes) -> str:
    """Return the decoded path of a request's URL. Raises an error, which httptools reports, for an invalid URL."""
    path: str = httptools.parse_url(url).path.decode("ascii")
    return unquote(path) if "%" in path else path


def without_upgrade(data: bytes) -> bytes:
    """Return data in which `Upgrade` headers are renamed: httptools would take what follows for another protocol."""
    end = data.find(b"\r\n\r\n") + 2  # end of the last complete header
    return UPGRADE.sub(b"\r\nignored:", data[:end]) + data[end:] if UPGRADE.search(data, 0, end) else data


@dataclass(slots=True, eq=False)
class IncomingRequest:
    """A request whose head has arrived, as a `Body` with the part that has arrived and is not read yet.

    write: sends bytes before the answer; read_on: goes on reading from the client. path: decoded; headers: by name in
    lower case; keep_alive: another request may follow.
    """

    write: Callable[[bytes], None]
    read_on: Callable[[], None]
    method: str
    path: str
    headers: Mapping[str, str]
    keep_alive: bool
    start: float = field(default_factory=time.monotonic)
    complete: bool = False
    gone: bool = False
    _continued: bool = False  # the client was told to send the body
    _arrived: list[bytes] = field(default_factory=list)
    _size: int = 0
    _waiter: "asyncio.Future[None] | None" = None
    _on_disconnect: Callable[[], None] | None = None

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
        self.complete = True
        self._wake()

    def leave(self) -> None:
        self.gone = True
        self._wake()
        if self._on_disconnect is not None:
            self._on_disconnect()

    async def read(self) -> bytes:
        if not (self._continued or self._arrived) and self.headers.get("expect", "").lower() == "100-continue":
            self.write(CONTINUE)
            self._continued = True
        while not self._arrived and not self.complete:
            if self.gone:
                raise Refused(Why.CANCELLED, "the client disconnected before its body had arrived")
            await self._wait()
        part = self._arrived[0] if len(self._arrived) == 1 else b"".join(self._arrived)
        self._arrived.clear()
        self._size = 0
        self.read_on()
        return part

    def watch(self, on_disconnect: Callable[[], None] | None) -> None:
        self._on_disconnect = on_disconnect
        if self.gone and on_disconnect is not None:
            on_disconnect()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
