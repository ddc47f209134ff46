"""A light HTTP/1.1 client for load tests, which sends encoded messages and returns whole answers.

A request of 12 kB and its answer take about 15 microseconds of CPU time; with aiohttp and geventhttpclient they take
about 100, as much as in a good server. The client uses httptools (the parser of Node.js) and uvloop.
"""

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType, ModuleType
from typing import NamedTuple, cast

from mpdsgr_deploy.errors import one_line
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.runtime.inference_protocol import HEADER
from mpdsgr_deploy.runtime.remote import ModelUrl

LONGEST = 30.0  # seconds that an answer may take
LARGEST = 1 << 28  # bytes of the largest answer
CLOSED = "it closes the connection without an answer"
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
JSON_SIZE = HEADER.lower().encode()


class HttpAnswer(NamedTuple):
    """An HTTP response. json_size: bytes of JSON in the body, if binary tensors follow it."""

    status: int
    body: bytes
    json_size: int | None


class NoAnswer(Exception):  # noqa: N818 - it says what happened
    """No answer came. kind: "timeout", or "connection" if it was refused, was closed, or is not HTTP."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


@dataclass(frozen=True)
class Endpoint:
    """A server, and the headers that every request to it has."""

    at: ModelUrl
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def authority(self) -> str:
        """HOST[:PORT] as in a URL."""
        host = f"[{self.at.host}]" if ":" in self.at.host else self.at.host
        return host if self.at.port is None else f"{host}:{self.at.port}"

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        """A TLS context with the system's authorities, or those in SSL_CERT_FILE; None for http."""
        return ssl.create_default_context() if self.at.tls else None

    def message(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS) -> bytes:
        lines = {"Host": self.authority, **self.headers, **headers, "Content-Length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


class Connection:
    """A persistent connection, which carries one request at a time and is opened again after it was closed."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._parsing = need("httptools", "serve")
        self._wire: _Wire | None = None

    async def ask(self, message: bytes) -> HttpAnswer:
        """Send a whole HTTP request and return the answer. Raises NoAnswer if none comes."""
        wire = self._wire
        if wire is None or wire.closed:
            wire = await self.open()
        return await wire.ask(message)

    async def open(self) -> "_Wire":
        """Open the connection. Raises NoAnswer if that fails."""
        at, tls = self.endpoint.at, self.endpoint.tls
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(LONGEST):
                _, self._wire = await loop.create_connection(
                    lambda: _Wire(self._parsing), at.host, at.port or (443 if tls else 80), ssl=tls
                )
        except TimeoutError:
            raise NoAnswer("timeout", f"it does not accept a connection within {LONGEST:g} s") from None
        except OSError as error:
            raise NoAnswer("connection", one_line(error)) from None
        return self._wire

    def close(self) -> None:
        """Close the connection, even while a request waits for its answer."""
        if self._wire is not None:
            self._wire.close()


class _Wire(asyncio.Protocol):
    """One TCP connection, from its opening to its end."""

    _transport: asyncio.Transport

    def __init__(self, parsing: ModuleType) -> None:
        self.closed = False
        self._parsing, self._parser = parsing, parsing.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[HttpAnswer] | None = None
        self._asked = 0.0
        self._early: HttpAnswer | None = None  # an answer before any request: a full server may refuse at once
        self._timer: asyncio.TimerHandle | None = None
        self._begin()

    def _begin(self) -> None:
        self._body: list[bytes] = []
        self._size = 0
        self._json_size: int | None = None

    async def ask(self, message: bytes) -> HttpAnswer:
        if self._early is not None:
            early, self._early = self._early, None
            self.close()
            return early
        if self.closed:
            raise NoAnswer("connection", CLOSED)
        self._waiting = waiting = self._loop.create_future()
        self._asked = time.monotonic()
        self._transport.write(message)
        try:
            return await waiting
        finally:
            self._waiting = None
            if waiting.cancelled():  # otherwise the late answer would be taken for that of the next request
                self.close()

    def close(self) -> None:
        self.closed = True
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class does not inherit from asyncio.Transport
        self._watch()

    def _watch(self) -> None:
        """Fail if the answer is late, else check again later: one timer per connection costs less than per request."""
        seconds_left = LONGEST
        if self._waiting is not None:
            seconds_left += self._asked - time.monotonic()
        if seconds_left <= 0:
            self._fail("timeout", f"it does not answer within {LONGEST:g} s")
        else:
            self._timer = self._loop.call_later(seconds_left, self._watch)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except self._parsing.HttpParserError as error:
            self._fail("connection", f"what it answers is not HTTP: {one_line(error)}")

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == JSON_SIZE and value.isdigit():
            self._json_size = int(value)

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > LARGEST:
            self._fail("connection", f"an answer is larger than {LARGEST} bytes")
        else:
            self._body.append(data)

    def on_message_complete(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        answer = HttpAnswer(self._parser.get_status_code(), body, self._json_size)
        if not self._asked:
            self._early = answer
            return
        if self._waiting is None or self._waiting.done():  # an answer without a request
            self.close()
            return
        self._waiting.set_result(answer)
        self._begin()
        if not self._parser.should_keep_alive():
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail("connection", one_line(error) if error else CLOSED)

    def _fail(self, kind: str, why: str) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(NoAnswer(kind, why))
        self.close()
