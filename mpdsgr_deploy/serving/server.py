"""The process: listeners, signals, and an end that loses no accepted request."""

import asyncio
import signal
import socket
from contextlib import suppress
from typing import NamedTuple

import uvloop

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.grpc import Grpc
from mpdsgr_deploy.serving.listener import Tls, listener
from mpdsgr_deploy.serving.security import check_exposure, is_loopback


class Address(NamedTuple):
    """Where to listen. grpc_port: None for no gRPC; a port 0 is any free one."""

    host: str
    port: int
    grpc_port: int | None


def run(server: Server, address: Address, tls: Tls | None = None, *, insecure: bool = False) -> None:
    """Serve until SIGTERM or SIGINT. Raises InputError if an address cannot be used or a model cannot serve."""
    mutual = tls is not None and tls.client_ca is not None
    check_exposure(address.host, authenticated=server.keys is not None or mutual, insecure=insecure)
    if tls is not None:
        tls.check()
    elif server.keys is not None and not is_loopback(address.host):
        log.warning("keys travel in clear text; give --tls-certificate and --tls-key, or end TLS before this server")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(server, address, tls))


async def _serve(server: Server, address: Address, tls: Tls | None) -> None:
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    patient = False  # with time for balancers to turn away

    def stop(wait: bool) -> None:
        nonlocal patient
        patient = wait
        end.set()

    loop.add_signal_handler(signal.SIGTERM, stop, True)
    loop.add_signal_handler(signal.SIGINT, stop, False)
    with _bound(address.host, address.port) as sock:
        http = listener(server, tls)
        grpc = None if address.grpc_port is None else await Grpc.start(server, address.host, address.grpc_port, tls)
        listening = loop.create_task(http.serve([sock]))
        listening.add_done_callback(lambda _: end.set())  # if it fails, the process ends with its error
        try:
            await _load(server, end)
            if not end.is_set():
                loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(server.repository.reload_changed()))
                _announce(sock, grpc, tls)
            await end.wait()
            await _drain(server, patient)
        finally:
            server.draining = True
            http.should_exit = True
            if grpc is not None:
                await grpc.stop(server.limits.drain_seconds)
            await listening
    left = server.requests
    await server.close()
    if left:
        log.error("stopped with %d requests unanswered after %g s", left, server.limits.drain_seconds)
    else:
        log.info("stopped; every accepted request was answered")


async def _load(server: Server, end: asyncio.Event) -> None:
    """Open the models while /v2/health/live already answers, unless the end comes first."""
    loading = asyncio.ensure_future(server.start())
    ending = asyncio.ensure_future(end.wait())
    await asyncio.wait({loading, ending}, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    await loading


async def _drain(server: Server, patient: bool) -> None:
    server.draining = True
    log.info("stopping: not ready any more, %d requests in work", server.requests)
    if patient:
        await asyncio.sleep(server.limits.grace_seconds)
    with suppress(TimeoutError):
        async with asyncio.timeout(server.limits.drain_seconds):
            while server.requests:
                await asyncio.sleep(0.01)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port"
        ) from None
    return sock


def _announce(sock: socket.socket, grpc: Grpc | None, tls: Tls | None) -> None:
    host, port = sock.getsockname()[:2]
    url = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
    beside = "" if grpc is None else f", gRPC on port {grpc.port}"
    log.info("serving on %s%s; the page there shows what is served", url, beside)
