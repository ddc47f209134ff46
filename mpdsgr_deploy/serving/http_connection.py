"""One HTTP/1.1 connection, parsed by httptools; every wait, size and queue is limited."""

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, Protocol, cast

import httptools

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.http import Exchange, Http
from mpdsgr_deploy.serving.http_request import (
    BAD,
    BUSY,
    HEAD_BYTES,
    PIPELINE_FULL,
    SLOW,
    TOO_LONG,
    IncomingRequest,
    encode_reply,
    refusal,
    url_path,
    without_upgrade,
)
from mpdsgr_deploy.serving.http_timer import ClientTimer
from mpdsgr_deploy.serving.refusals import Refused

PIPELINED = 64  # requests on a connection that may wait for earlier answers
READ_AHEAD = 8  # waiting requests after which reading pauses; meanwhile a disconnect goes unnoticed
LINGER = 2.0  # seconds for which data are read and discarded at the end, so that the client can read its answer
PROBE_SECONDS = 1.0  # seconds for the head of a request on a connection above the limit
PROBES = ("/v2/health/live", "/v2/health/ready")  # paths that such a connection may ask for


class ConnectionOwner(Protocol):
    """The listener. A connection calls it when it is open, after any TLS handshake, and when it has ended."""

    server: Server
    http: Http

    def connection_made(self, connection: "HttpConnection") -> None: ...
    def connection_ended(self, connection: "HttpConnection") -> None: ...
    def run(self, coroutine: Coroutine[Any, Any, None]) -> None: ...


class HttpConnection(asyncio.Protocol):
    """Answers the requests of one client in order.

    has_place: whether the connection is within the limit on connections; without a place, a client may only ask for the
    server's health.
    """

    def __init__(self, owner: ConnectionOwner, *, has_place: bool) -> None:
        self._owner, self._limits = owner, owner.server.limits
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpRequestParser(self)
        # ignore data after the last request instead of reporting an error
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._transport: asyncio.Transport
        self._url, self._headers = b"", dict[str, str]()
        self._head_open = False  # a head is incomplete
        self._head_bytes = 0  # bytes of this head
        self._idle_bytes = 0  # bytes since the last complete head, piece of a body, or message
        self._incoming: IncomingRequest | None = None  # the request whose body is arriving
        self._active: IncomingRequest | None = None  # the request that is being answered
        self._queue: deque[IncomingRequest] = deque()
        self._last: Refused | None = None  # sent after the outstanding answers, before the connection is closed
        self.over = False  # no more data are accepted from this client
        self._write_paused = self._read_paused = False
        self._timer = ClientTimer(self._time_passed)
        self._late: Refused | None = None  # the answer to a client that is too slow; None: it is disconnected
        self.has_place = has_place
        self.connected = self.has_sent = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class does not inherit from asyncio.Transport
        self._owner.connection_made(self)
        self.connected, self.opened = True, self._loop.time()
        if self.has_place:
            self._expect(self._limits.header_seconds, SLOW)
        else:
            self._expect(PROBE_SECONDS, BUSY)

    def give_place(self) -> None:
        """Allow all requests from now on, because another connection has ended."""
        self.has_place = True
        if self._late is BUSY:
            self._expect(self._limits.header_seconds, SLOW)

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.connection_ended(self)
        self.over = True
        if self._active is not None:
            self._active.leave()
        # drop references, because cycles would stay in memory until a garbage collection
        self._timer.end()
        self._queue.clear()
        self._parser = self._incoming = self._active = None

    @property
    def peer(self) -> str:
        where = self._transport.get_extra_info("peername")
        return f"{where[0]}:{where[1]}" if isinstance(where, tuple) else ""

    def data_received(self, data: bytes) -> None:
        if self.over or self._last:
            return
        self.has_sent = True
        if self._incoming is None:
            data = without_upgrade(data)
        self._idle_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError):
            self._end(BAD)
        if self._idle_bytes > HEAD_BYTES:  # an endless head, or endless trailers
            self._end(TOO_LONG)
        elif self._head_open and self._late is None:
            self._expect(self._limits.header_seconds, SLOW)

    def eof_received(self) -> None:
        """Close the connection, as asyncio does if this returns None: the end of the client's data is its end."""

    # callbacks of the parser

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
        if self.over or self._last:  # the parser continues to the end of the data that it has
            return
        parser, version = self._parser, self._parser.get_http_version()
        if self._head_bytes > HEAD_BYTES:
            self._end(TOO_LONG)
        elif version not in ("1.1", "1.0") or parser.should_upgrade():
            # after an upgrade the parser would take what follows, even a body, for another protocol or request
            self._end(BAD)
        elif len(self._queue) >= PIPELINED:
            self._end(PIPELINE_FULL)
        else:
            path = url_path(self._url)
            if not self.has_place and path not in PROBES:
                self._end(BUSY)
                return
            self._timer.rest()
            self._late = None
            keep_alive = version == "1.1" and parser.should_keep_alive() and self.has_place
            self._begin(
                IncomingRequest(self.write, self.read_on, parser.get_method().decode(), path, self._headers, keep_alive)
            )

    def _begin(self, request: IncomingRequest) -> None:
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
        if request is not None and not self.over and not request.gone:
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
        self._owner.run(self._answered(request))

    async def _answered(self, request: IncomingRequest) -> None:
        exchange = Exchange(request.method, request.path, request.headers, request, lambda: self.peer, request.start)
        reply = await self._owner.http.answer(exchange)
        if self.over:
            return
        keep = request.keep_alive and request.at_end and not self._owner.server.draining
        keep = keep and self._loop.time() - self.opened < self._limits.connection_age_seconds
        with_body = request.method != "HEAD"
        self._transport.write(encode_reply(reply, exchange.id, keep_alive=keep, with_body=with_body))
        self._active = None
        if not keep:
            self._close(clean=request.at_end and not self._queue)
        elif not self._write_paused:
            self._go_on()

    def _go_on(self) -> None:
        if self._queue:
            self._answer(self._queue.popleft())
        elif self._last:
            self._refuse(self._last)
        elif not self._head_open:
            self._expect(self._limits.keep_alive_seconds, None)
        self.read_on()

    def write(self, data: bytes) -> None:
        if not self.over:
            self._transport.write(data)

    def _end(self, error: Refused) -> None:
        """Answer invalid or late input with `error`, after the requests before it, and close."""
        if self.over or self._last:
            return
        invalid, self._incoming = self._incoming, None  # a request whose remaining data are invalid gets this answer
        if invalid is not None and invalid in self._queue:
            self._queue.remove(invalid)
        if self._active is None or self._active is invalid:
            self._refuse(error)
        else:
            self._last = error

    def _refuse(self, error: Refused) -> None:
        self._transport.write(refusal(self._owner.server, error))
        self._close(clean=False)

    def _close(self, *, clean: bool) -> None:
        """End the connection: now if it is `clean`, else after LINGER, because more data may come from the client."""
        self.over = True
        self._queue.clear()
        self._incoming = None  # go on reading and discard the data, because unread bytes would reset the connection
        if self._active is not None:
            self._active.leave()
        if clean or self._transport.is_closing():
            self._transport.close()
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self.read_on()
        self._expect(LINGER, None)

    def shut(self) -> None:
        """Close the connection if no request has begun; if one has, its answer closes it while the server drains."""
        if self._active is None and not self._head_open and not self.over:
            self._close(clean=True)

    def abort(self) -> None:
        self._transport.abort()

    # limits on time and on buffered data

    def _expect(self, seconds: float, late: Refused | None) -> None:
        """Wait for the client for `seconds`; then send the answer `late`, if it is not None, and close."""
        self._late = late
        self._timer.expect(seconds)

    def _time_passed(self) -> None:
        if self._late is not None:
            self._end(self._late)
        else:
            self.over = True
            self._transport.close()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._active is None and not self.over:
            self._go_on()

    def _pause_reading(self) -> None:
        if not self._read_paused and not self._transport.is_closing():
            self._read_paused = True
            self._transport.pause_reading()

    def read_on(self) -> None:
        """Go on reading from the client, unless enough requests wait or a buffered body is full."""
        incoming = self._incoming
        if self._read_paused and not (len(self._queue) >= READ_AHEAD or (incoming is not None and incoming.full)):
            self._read_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
