"""The HTTP listener: it accepts a limited number of connections, TLS handshakes included, and loses none at its end."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.http import Http
from mpdsgr_deploy.serving.http_connection import HttpConnection
from mpdsgr_deploy.serving.http_request import BUSY, HEAD_BYTES, refusal
from mpdsgr_deploy.serving.last_connections import take_no_more

RESERVE = 32  # connections above the limit, which may only ask for the server's health
AT_ONCE = 200  # connections that are accepted before other tasks run
PAUSE = 0.1  # seconds until a listener without a free file descriptor tries again
TURN = 0.002  # seconds in which a process with fewer connections may accept the next one first
BACKLOG = 2048  # connections that may wait to be accepted
FRESH = 1.0  # seconds for which a stopping server waits for the first request of an accepted connection
TLS_GOODBYE = 1.0  # seconds that a client has to confirm the end of TLS
TCP_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
NO_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Tls(NamedTuple):
    """The PEM files of a server. client_ca: the authority for clients' certificates; None: clients need none."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Return the SSL context of a server with these files. Raises InputError if they are unusable."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.renew(context)
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ssl.SSLError) as error:
                raise InputError(f"--tls-client-ca {self.client_ca} cannot be used: {error}") from None
        return context

    def renew(self, context: ssl.SSLContext) -> None:
        """Use the current content of the files for new connections. Raises InputError as `context` does."""
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"--tls-certificate {self.certificate} and --tls-key {self.key} cannot be used: {error}"
            ) from None

    def grpc(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials, which check at every handshake whether the certificate was renewed."""
        ca = None if self.client_ca is None else self.client_ca.read_bytes()
        configuration = grpc.ssl_server_certificate_configuration([self._pair()], root_certificates=ca)
        current = [self._pair()]

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            try:
                # raises if certificate and key do not fit, so that the old pair stays in use
                self.renew(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
                pair = self._pair()
            except (InputError, OSError):
                return None
            if pair == current[0]:
                return None
            current[0] = pair
            return grpc.ssl_server_certificate_configuration([pair], root_certificates=ca)

        return grpc.dynamic_ssl_server_credentials(configuration, renewed, require_client_authentication=ca is not None)

    def _pair(self) -> tuple[bytes, bytes]:
        return self.key.read_bytes(), self.certificate.read_bytes()


class Listener:
    """Accepts connections on a bound socket from `start` on, and ends them with `stop_accepting` and `close`."""

    def __init__(self, server: Server, sock: socket.socket, tls: Tls | None) -> None:
        self.server, self.http = server, Http(server)
        self.connections: set[HttpConnection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._places_taken = 0  # connections that count towards `limits.connections`
        self._without_place: dict[HttpConnection, None] = {}  # connections above that limit, the oldest first
        self._sock, self._tls = sock, tls
        self._context = None if tls is None else tls.context()
        self._loop = asyncio.get_running_loop()
        self._accepting = self._waited = False

    def start(self) -> None:
        self._sock.setblocking(False)
        self._sock.listen(BACKLOG)
        self._accepting, self.server.counts.accepting = True, 1
        self._loop.add_reader(self._sock, self._take_turn)

    def renew_certificate(self) -> None:
        """Read the certificate files again for new connections; an unusable certificate is logged and not used."""
        if self._tls is not None and self._context is not None:
            try:
                self._tls.renew(self._context)
                log.info("TLS certificate read from %s", self._tls.certificate)
            except InputError as error:
                log.error("the new TLS certificate cannot be used, and the previous one stays in use: %s", error)

    @property
    def expecting(self) -> bool:
        """Whether a connection was accepted so recently that its first request may still be on its way."""
        now = self._loop.time()
        return any(not c.has_sent and now - c.opened < FRESH for c in self.connections)

    def stop_accepting(self) -> None:
        """Accept no more connections, except those that the system has accepted if no other process takes them."""
        if self._accepting:
            self._accepting, self.server.counts.accepting = False, 0
            self._loop.remove_reader(self._sock)
            if not self.server.group.accepting:
                take_no_more(self._sock)
                self._accept(at_once=1 << 16)
        self._sock.close()

    async def close(self, seconds: float) -> None:
        """Close idle connections now, others after their answer, and those that remain after `seconds`."""
        end = self._loop.time() + seconds
        while self.tasks and self._loop.time() < end:
            for connection in list(self.connections):
                connection.shut()
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.shut()
        for _ in range(10):  # let written data be sent
            if not self.connections:
                return
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        for task in self.tasks:
            task.cancel()

    def _take_turn(self) -> None:
        """Accept connections, but let a process with fewer connections do so first."""
        group = self.server.group
        if group.has_most_connections and not self._waited:
            self._waited = True
            self._loop.remove_reader(self._sock)
            self._loop.call_later(TURN, self._resume)
            return
        self._waited = False
        self._accept(AT_ONCE if group.processes == 1 else 1)

    def _accept(self, at_once: int) -> None:
        for _ in range(at_once):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in NO_FILES:
                    raise
                log.error(
                    "cannot accept connections: %s; %d connections are open",
                    error.strerror,
                    self.server.counts.connections,
                )
                if self._accepting:
                    self._loop.remove_reader(self._sock)
                    self._loop.call_later(PAUSE, self._resume)
                return
            self._admit(sock)

    def _resume(self) -> None:
        if self._accepting:
            self._loop.add_reader(self._sock, self._take_turn)

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if self.server.counts.connections >= self.server.limits.connections + RESERVE:
            answer = refusal(self.server, BUSY)
            if self._context is None:
                with suppress(OSError):
                    sock.send(answer)
                    sock.recv(HEAD_BYTES)  # an unread request would reset the connection before the answer is read
            sock.close()
            return
        if TCP_USER_TIMEOUT is not None:  # limit the time in which a client must receive its answer
            sock.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, int(self.server.limits.body_seconds * 1000))
        self.server.counts.connections += 1  # a connection counts from its handshake on
        connection = HttpConnection(self, has_place=self._places_taken < self.server.limits.connections)
        if connection.has_place:
            self._places_taken += 1
        else:
            self._without_place[connection] = None
        self.run(self._connect(sock, connection))

    def connection_made(self, connection: HttpConnection) -> None:
        self.connections.add(connection)

    def connection_ended(self, connection: HttpConnection) -> None:
        """Give the place of an ended connection to the one that has waited longest."""
        self.server.counts.connections -= 1
        self.connections.discard(connection)
        self._without_place.pop(connection, None)
        if not connection.has_place:
            return
        waiting = next((other for other in self._without_place if not other.over), None)
        if waiting is None:
            self._places_taken -= 1
        else:
            del self._without_place[waiting]
            waiting.give_place()

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as one of `tasks`."""
        task = self._loop.create_task(coroutine)
        self.tasks.add(task)  # keep a reference, because the event loop keeps only a weak one
        task.add_done_callback(self.tasks.discard)

    async def _connect(self, sock: socket.socket, connection: HttpConnection) -> None:
        options: dict[str, Any] = {}
        if self._context is not None:
            options = {
                "ssl": self._context,
                "ssl_handshake_timeout": self.server.limits.header_seconds,
                "ssl_shutdown_timeout": TLS_GOODBYE,
            }
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock, **options)
        except (OSError, TimeoutError):  # the handshake failed; TLS errors are OSErrors
            pass
        finally:
            if not connection.connected:
                sock.close()
                self.connection_ended(connection)
