"""One HTTP/1.1 connection: httptools parses what comes, and every wait, every size and every queue has a bound."""

import asyncio
import json
import re
import socket
from collections import deque
from functools import lru_cache
from http import HTTPStatus
from math import inf
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import httptools

from mpdsgr_deploy.serving.errors import Refused, Why
from mpdsgr_deploy.serving.http import Exchange, Reply, response_headers

if TYPE_CHECKING:
    from mpdsgr_deploy.serving.listener import Listener

HEAD_BYTES = 1 << 16  # of a request line and its headers, or of anything else that brings no body
BODY_BYTES = 1 << 16  # of a body that may wait to be read before the client has to
PIPELINED = 64  # requests on a connection that wait for the answer to the one before
READ_AHEAD = 8  # of these that are read before the client has to wait; while reading stops, its leaving goes unseen
LINGER = 2.0  # seconds that a client may go on sending what is not read, so that it gets the answer to it
PROBE_SECONDS = 1.0  # for the head of a connection above the limit
PROBES = ("/v2/health/live", "/v2/health/ready")
TCP_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
UPGRADE = re.compile(rb"(?i)\r\nupgrade:")
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def _canned(status: str, error: str, *headers: str) -> bytes:
    """An answer that is sent before there is a request to answer."""
    body = json.dumps({"error": error})
    lines = (f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *headers)
    return "\r\n".join((*lines, "connection: close", "", body)).encode()


BAD = _canned("400 Bad Request", "this is no HTTP/1.1 request")
SLOW = _canned("408 Request Timeout", "the request's head did not arrive in time")
TOO_LONG = _canned("431 Request Header Fields Too Large", f"a request's head may have {HEAD_BYTES} bytes")
BUSY = _canned("503 Service Unavailable", "too many connections; try again soon", "retry-after: 1")


class IncomingRequest:
    """A request whose head is here, and the part of its body that has arrived and was not read yet."""

    __slots__ = ("_arrived", "_connection", "_size", "_waiter", "complete", "exchange", "expects", "gone", "keep_alive")

    def __init__(self, connection: "HttpConnection", keep_alive: bool, expects: bool) -> None:
        self._connection, self.keep_alive, self.expects = connection, keep_alive, expects
        self._arrived: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self.complete = self.gone = False
        self.exchange: Exchange

    @property
    def at_end(self) -> bool:
        """Whether all of the body was read."""
        return self.complete and not self._arrived

    @property
    def full(self) -> bool:
        """Whether more of the body should not be taken in yet."""
        return self._size > BODY_BYTES

    def feed(self, part: bytes) -> None:
        self._arrived.append(part)
        self._size += len(part)
        self._wake()

    def finish(self) -> None:
        """The body is complete."""
        self.complete = True
        self._wake()

    def leave(self) -> None:
        """The client has left."""
        self.gone = True
        self._wake()

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

    async def left(self) -> None:
        while not self.gone:
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class HttpConnection(asyncio.Protocol):
    """Answers the requests of one client in their order. One above the limit may ask for health alone."""

    def __init__(self, listener: "Listener") -> None:
        self._listener, self._limits = listener, listener.server.limits
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # what follows is not read, and no error
        self._transport: asyncio.Transport
        self._url, self._headers = b"", dict[str, str]()
        self._head_open = False  # a head has begun and not ended
        self._head_bytes = self._idle_bytes = 0  # of this head; since something was complete, or a body grew
        self._incoming: IncomingRequest | None = None  # whose body comes in
        self._active: IncomingRequest | None = None  # which is being answered
        self._queue: deque[IncomingRequest] = deque()
        self._last = b""  # what is sent behind the answers that are due, before the connection is closed
        self._over = False  # nothing more is taken from this client
        self._write_paused = self._read_paused = False
        self._due, self._late = inf, b""  # when the client has been silent for too long, and what it is told then
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self.connected = self.heard = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._listener.connections.add(self)
        self.connected, self.opened = True, self._loop.time()
        if TCP_USER_TIMEOUT is not None:  # for a client to take its answer; its silence would hold the connection open
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, int(self._limits.body_seconds * 1000))
        self._above = self._listener.server.connections > self._limits.connections
        self._expect(PROBE_SECONDS if self._above else self._limits.header_seconds, BUSY if self._above else SLOW)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.server.connections -= 1
        self._listener.connections.discard(self)
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._active is not None:
            self._active.leave()
        self._queue.clear()
        self._parser = None

    @property
    def peer(self) -> str:
        """The client's address."""
        where = self._transport.get_extra_info("peername")
        return f"{where[0]}:{where[1]}" if isinstance(where, tuple) else ""

    @property
    def idle(self) -> bool:
        """Whether no request has begun that is not answered."""
        return self._active is None and not self._head_open

    def data_received(self, data: bytes) -> None:
        if self._over or self._last:
            return
        self.heard = True
        if self._incoming is None:
            data = _without_upgrade(data)
        self._idle_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError):
            self._end(BAD)
        if self._idle_bytes > HEAD_BYTES:  # an endless head, or endless trailers
            self._end(TOO_LONG)
        elif self._head_open and self._late not in (SLOW, BUSY):
            self._expect(self._limits.header_seconds, SLOW)

    def eof_received(self) -> None:
        """The client sends nothing more: it has left."""

    # what the parser calls

    def on_message_begin(self) -> None:
        self._url, self._headers, self._head_bytes, self._head_open = b"", {}, 0, True

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        self._idle_bytes, self._head_open = 0, False
        if self._over or self._last:  # but the parser goes on to the end of what it was given
            return
        parser, version = self._parser, self._parser.get_http_version()
        if self._head_bytes > HEAD_BYTES:
            self._end(TOO_LONG)
        elif version not in ("1.1", "1.0") or parser.should_upgrade():
            # after an upgrade the parser takes what follows, even a body, for another protocol or another request
            self._end(BAD)
        elif len(self._queue) >= PIPELINED:
            self._end(BUSY)
        else:
            path = _path(self._url)
            if self._above and path not in PROBES:
                self._end(BUSY)
                return
            self._due, self._late = inf, b""
            self._begin(path, parser.get_method().decode(), version == "1.1" and parser.should_keep_alive())

    def _begin(self, path: str, method: str, keep_alive: bool) -> None:
        expects = self._headers.get("expect", "").lower() == "100-continue"
        request = IncomingRequest(self, keep_alive and not self._above, expects)
        request.exchange = Exchange(method, path, self._headers, request, lambda: self.peer)
        self._incoming = request
        if self._active is None:
            self._answer(request)
        else:
            self._queue.append(request)
            if len(self._queue) >= READ_AHEAD:
                self._pause_reading()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        request = self._incoming
        if request is not None and not self._over and not request.gone:
            request.feed(body)
            if request.full:
                self._pause_reading()

    def on_message_complete(self) -> None:
        self._idle_bytes = 0
        if self._incoming is not None:
            self._incoming.finish()
            self._incoming = None

    # answers

    def _answer(self, request: IncomingRequest) -> None:
        self._active = request
        task = self._loop.create_task(self._answered(request))
        self._listener.tasks.add(task)  # a reference, or the loop may forget it
        task.add_done_callback(self._listener.tasks.discard)

    async def _answered(self, request: IncomingRequest) -> None:
        reply = await self._listener.http.answer(request.exchange)
        if self._over:
            return
        keep = request.keep_alive and request.at_end and not self._listener.server.draining
        keep = keep and self._loop.time() - self.opened < self._limits.connection_age_seconds
        self._send(request.exchange, reply, keep)
        self._active = None
        if not keep:
            self._close(clean=request.at_end and not self._queue)
        elif not self._write_paused:
            self._go_on()

    def _go_on(self) -> None:
        """Answer the next request, if there is one."""
        if self._queue:
            self._answer(self._queue.popleft())
        elif self._last:
            self._transport.write(self._last)
            self._close(clean=False)
        elif not self._head_open:
            self._expect(self._limits.keep_alive_seconds, b"")
        self.read_on()

    def _send(self, exchange: Exchange, reply: Reply, keep: bool) -> None:
        parts = [STATUS_LINES.get(reply.status) or b"HTTP/1.1 %d Closed\r\n" % reply.status]
        for name, value in response_headers(exchange, reply):
            parts += (name, b": ", value, b"\r\n")
        parts.append(b"\r\n" if keep else b"connection: close\r\n\r\n")
        if exchange.method != "HEAD":
            parts.append(reply.body)
        self._transport.write(b"".join(parts))

    def write(self, data: bytes) -> None:
        """Something before the answer."""
        if not self._over:
            self._transport.write(data)

    def _end(self, answer: bytes) -> None:
        """Answer what cannot be a request, in its turn, and close."""
        if self._over or self._last:
            return
        self._listener.server.other_codes["http", answer[9:12].decode()] += 1
        wrong, self._incoming = self._incoming, None  # a request whose rest is wrong gets this answer
        if wrong is not None and wrong in self._queue:
            self._queue.remove(wrong)
        if self._active is None or self._active is wrong:
            self._transport.write(answer)
            self._close(clean=False)
        else:
            self._last = answer

    def _close(self, *, clean: bool) -> None:
        """End the connection; where more may be on its way, not before the client had time to read the answer."""
        self._over = True
        self._queue.clear()
        if self._active is not None:
            self._active.leave()
        if clean or self._transport.is_closing():
            self._transport.close()
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self.read_on()
        self._expect(LINGER, b"")

    def shut(self) -> None:
        """Close a connection on which nothing is in work; others close behind their answer."""
        if self.idle and not self._over:
            self._close(clean=True)

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    # bounds on time and on what is buffered

    def _expect(self, seconds: float, late: bytes) -> None:
        """Something within so many seconds, or this answer and the end. One timer serves, moved on when it fires."""
        self._due, self._late = self._loop.time() + seconds, late
        if self._timer is None or self._timer_at > self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._look_at_due()

    def _look_at_due(self) -> None:
        self._timer, self._timer_at = self._loop.call_at(self._due, self._look), self._due

    def _look(self) -> None:
        self._timer = None
        if self._due == inf:
            return
        if self._loop.time() < self._due:
            self._look_at_due()
        elif self._late:
            self._end(self._late)
        else:
            self._over = True
            self._transport.close()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._active is None and not self._over:
            self._go_on()

    def _pause_reading(self) -> None:
        if not self._read_paused and not self._transport.is_closing():
            self._read_paused = True
            self._transport.pause_reading()

    def read_on(self) -> None:
        """Take in more, unless enough requests wait or a body is not read yet."""
        incoming = self._incoming
        if self._read_paused and not (len(self._queue) >= READ_AHEAD or (incoming is not None and incoming.full)):
            self._read_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()


@lru_cache(maxsize=1024)
def _path(url: bytes) -> str:
    """Raises an error, which the parser reports, for a URL without a path or not in ASCII."""
    path: str = httptools.parse_url(url).path.decode("ascii")
    return unquote(path) if "%" in path else path


def _without_upgrade(data: bytes) -> bytes:
    """A request that offers another protocol is answered in this one: the parser must not see the offer."""
    end = data.find(b"\r\n\r\n") + 2  # of the last header that is here
    return UPGRADE.sub(b"\r\nignored:", data[:end]) + data[end:] if UPGRADE.search(data, 0, end) else data
