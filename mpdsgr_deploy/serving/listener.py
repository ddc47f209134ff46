"""uvicorn as this server's HTTP listener, with the bounds that it lacks: on connections, and on a request's head."""

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.http import Http

HEAD_BYTES = 1 << 16  # of a request line and its headers
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


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
    """A connection: one of a bounded number, whose every head arrives in time and is not too long."""

    of: Server

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None  # runs while a head is incomplete
        self._head_bytes = 0
        self.of.connections += 1
        if self.of.connections > self.of.limits.connections:
            transport.write(BUSY)
            transport.close()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.of.connections -= 1
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._head is None:
            self._await_head()
        waiting = self._head
        super().data_received(data)
        if waiting is not None and self._head is waiting:  # this data did not complete it
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._end(TOO_LONG)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > HEAD_BYTES:
            self._end(TOO_LONG)
            return
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head = self.loop.call_later(self.of.limits.header_seconds, self._end, SLOW)

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _end(self, answer: bytes) -> None:
        self._stop_waiting()
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()
