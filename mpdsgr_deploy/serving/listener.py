"""uvicorn as this server's HTTP listener, with the bounds that it lacks: on connections, and on a request's head."""

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.http import Http

HEAD_BYTES = 1 << 16  # of a request line and its headers, or of anything else that brings no body
PIPELINED = 64  # requests on a connection that wait for the answer to the one before
TCP_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
UPGRADE = re.compile(rb"(?i)\r\nupgrade:")


def _canned(status: str, error: str, *headers: str) -> bytes:
    """An answer that is sent before there is a request to answer."""
    body = json.dumps({"error": error})
    lines = (f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *headers)
    return "\r\n".join((*lines, "connection: close", "", body)).encode()


BAD = _canned("400 Bad Request", "this is no HTTP/1.1 request")
SLOW = _canned("408 Request Timeout", "the request's head did not arrive in time")
TOO_LONG = _canned("431 Request Header Fields Too Large", f"a request's head may have {HEAD_BYTES} bytes")
BUSY = _canned("503 Service Unavailable", "too many connections; try again soon", "retry-after: 1")


class Tls(NamedTuple):
    """PEM files. client_ca: who must have signed a client's certificate; None: clients need none."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def check(self) -> None:
        """Raise InputError unless the files make a TLS server."""
        files = f"{self.certificate} and {self.key}"
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                files = str(self.client_ca)
                context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"no TLS with {files}: {error}") from None

    def grpc(self) -> grpc.ServerCredentials:
        """As gRPC takes them."""
        ca = None if self.client_ca is None else self.client_ca.read_bytes()
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)

    def options(self) -> dict[str, Any]:
        """As uvicorn takes them."""
        return {
            "ssl_certfile": self.certificate,
            "ssl_keyfile": self.key,
            "ssl_ca_certs": self.client_ca,
            "ssl_cert_reqs": ssl.CERT_NONE if self.client_ca is None else ssl.CERT_REQUIRED,
        }


class Listener(uvicorn.Server):
    """Serves the application on a socket until `should_exit`; signals are the caller's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listener(server: Server, tls: Tls | None) -> Listener:
    """A uvicorn server for `server`, not started yet."""
    limits = server.limits

    class Protocol(BoundedProtocol):
        of = server

    config = uvicorn.Config(
        Http(server),
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=max(5, int(limits.header_seconds)),
        timeout_graceful_shutdown=int(limits.drain_seconds) + 1,
        **(tls.options() if tls else {}),
    )
    return Listener(config)


class BoundedProtocol(HttpToolsProtocol):
    """A connection: one of a bounded number, whose every head arrives in time, and which keeps little in memory."""

    of: Server

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if TCP_USER_TIMEOUT is not None:  # for a client to take its answer; its silence would hold the connection open
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, int(self.of.limits.body_seconds * 1000))
        self._head: asyncio.TimerHandle | None = None  # runs while a head is incomplete
        self._idle_bytes = 0  # since something was complete, or a body grew
        self._active: RequestResponseCycle | None = None  # which of the pipelined requests is being answered
        self._last = b""  # what is sent behind the answers that are due, before the connection is closed
        self.of.connections += 1
        if self.of.connections > self.of.limits.connections:
            self._end(BUSY)
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.of.connections -= 1
        self._stop_waiting()
        if self._active is not None:  # uvicorn tells the newest request only, which may wait behind this one
            self._active.disconnected = True
            self._active.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        if self.cycle is None or self.cycle.response_complete:
            if self._head is None:
                self._await_head()
            data = _without_upgrade(data)
        self._idle_bytes += len(data)
        super().data_received(data)
        if self._idle_bytes > HEAD_BYTES:  # an endless head, or endless trailers
            self._end(TOO_LONG)

    def on_headers_complete(self) -> None:
        self._idle_bytes = 0
        self._stop_waiting()
        if self._over:  # but the parser goes on to the end of what it was given
            return
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > HEAD_BYTES:
            self._end(TOO_LONG)
        elif self.parser.get_http_version() not in ("1.1", "1.0") or self.parser.should_upgrade():
            # after an upgrade the parser takes what follows, even a body, for another protocol or another request
            self._end(BAD)
        elif len(self.pipeline) >= PIPELINED:
            self._end(BUSY)
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        if not self._over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._idle_bytes = 0
        if not self._over:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        due = bool(self.pipeline)
        super().on_response_complete()
        if self._last and not due:
            self._close(self._last)

    def send_400_response(self, msg: str) -> None:
        self._end(BAD)

    @property
    def _over(self) -> bool:
        """Whether nothing more is taken from this client."""
        return bool(self._last) or self.transport.is_closing()

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.of.limits.header_seconds, self._end, SLOW)

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _end(self, answer: bytes) -> None:
        """Answer what cannot be a request, in its turn, and close."""
        self._stop_waiting()
        if self._over:
            return
        self.of.other_codes["http", answer[9:12].decode()] += 1
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy and self.cycle.more_body:  # it is this request whose rest is wrong
            if self.pipeline:
                self.pipeline.popleft()
            else:
                busy = False
        if busy:
            self._last = answer
        else:
            self._close(answer)

    def _close(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """A request that offers another protocol is answered in this one: the parser must not see the offer."""
    end = data.find(b"\r\n\r\n") + 2  # of the last header that is here
    return UPGRADE.sub(b"\r\nignored:", data[:end]) + data[end:] if UPGRADE.search(data, 0, end) else data
