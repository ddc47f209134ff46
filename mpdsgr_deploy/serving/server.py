"""The server process: listeners, signals, and a shutdown that loses no accepted request."""

import asyncio
import gc
import resource
import signal
import socket
import sys
import time
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import uvloop

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving import metrics
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.grpc import start_grpc
from mpdsgr_deploy.serving.listener import BACKLOG, Listener, Tls
from mpdsgr_deploy.serving.logs import log_json
from mpdsgr_deploy.serving.security import check_exposure, is_loopback
from mpdsgr_deploy.serving.supervisor import SIGNALS, Supervisor, beat

LAST_CALL = 0.1  # seconds in which open connections can still send a request that is answered
QUIET = 5  # checks, 10 ms apart, without a request before the end; gRPC would cancel calls that its thread still holds
COLLECTION = 10_000, 10, 10  # thresholds of garbage collection, high because requests leave no cycles behind
# seconds until a thread that waits for the interpreter gets it: with the default of 5 ms the next batch waited for the
# handling of requests
SWITCH_SECONDS = 2e-4
OTHER_FILES = 200  # files that a server has open in addition to its connections


class Address(NamedTuple):
    """The addresses to listen on. grpc_port: None for no gRPC. Port 0 stands for any free port."""

    host: str
    port: int
    grpc_port: int | None


def run(server: Server, address: Address, tls: Tls | None = None, *, insecure: bool = False) -> int:
    """Serve until SIGTERM or SIGINT, and return how many accepted requests got no answer.

    insecure: allow an address that other machines reach without authentication. Raises InputError if an address or a
    certificate cannot be used, and the errors of `Server.start` if a model cannot serve.
    """
    mutual = tls is not None and tls.client_ca is not None
    check_exposure(address.host, authenticated=server.keys is not None or mutual, insecure=insecure)
    server.local = is_loopback(address.host) and server.keys is None and not insecure
    if tls is not None:
        tls.context()
    elif server.keys is not None and not is_loopback(address.host):
        log.warning(
            "API keys are sent unencrypted; give --tls-certificate and --tls-key, or put a proxy with TLS in front "
            "of this server"
        )
    gc.freeze()  # imported objects stay in memory, so garbage collections need not visit them
    gc.set_threshold(*COLLECTION)
    sys.setswitchinterval(SWITCH_SECONDS)
    _raise_file_limit(server.settings.limits.connections)
    with _bound(address.host, address.port) as sock:
        if server.group.processes > 1:
            lost = _run_group(server, address, sock, tls)
        else:
            lost = _run_here(server, address, sock, tls)
    if lost:
        log.error("stopped with %d requests unanswered after %g s", lost, server.limits.drain_seconds)
    else:
        log.info("stopped; every accepted request was answered")
    return lost


def _run_here(server: Server, address: Address, sock: socket.socket, tls: Tls | None, alive: int | None = None) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(server, address, sock, tls, alive))


def _run_group(server: Server, address: Address, sock: socket.socket, tls: Tls | None) -> int:
    ports = [sock]
    if address.grpc_port is not None:
        ports.append(_reserved(address.host, address.grpc_port))
        address = address._replace(grpc_port=ports[1].getsockname()[1])

    def work(alive: int) -> int:
        log_json(process=server.group.index)
        return _run_here(server, address, sock, tls, alive)

    supervisor = Supervisor(server.group, work, ports, server.settings.machine.hang_seconds)
    return supervisor.run(lambda: _announce(sock, address.grpc_port, tls, server.group.processes))


def _raise_file_limit(connections: int) -> None:
    """Raise the limit on open files, if the system allows it, so that every allowed connection has a descriptor."""
    needed = 2 * connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        log.warning(
            "this process may open %d files, but %d connections over HTTP and as many over gRPC need %d; raise "
            "the limit (ulimit -n, LimitNOFILE) or lower limits.connections",
            hard,
            connections,
            needed,
        )
        needed = hard
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _serve(server: Server, address: Address, sock: socket.socket, tls: Tls | None, alive: int | None) -> int:
    """Run the server until it is told to end; return how many requests got no answer.

    alive: a file descriptor that becomes readable when the supervising process ends; None without such a process.
    """
    loop, group = asyncio.get_running_loop(), server.group
    end, hurry, reload = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def interrupt() -> None:
        end.set()
        hurry.set()  # a person pressed Ctrl-C, so the server does not wait for a load balancer

    loop.add_signal_handler(signal.SIGTERM, end.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    # set before models are loaded, because the signal would otherwise end the process
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if alive is not None:
        loop.add_reader(alive, end.set)
        beat(group, server.settings.machine.hang_seconds)
    await group.listen({"figures": server.figures, "metrics": partial(asyncio.to_thread, metrics.families, server)})
    http = Listener(server, sock, tls)
    grpc: Any = None
    seconds_left, lost = 0.0, 0
    try:
        if not group.replacement:  # answer liveness probes from the start
            grpc = await _listen(server, http, address, tls)
        if await _load(server, end):
            if group.replacement:  # other processes serve, so accept no connection before the models are loaded
                await server.require_same_bundles()
                grpc = await _listen(server, http, address, tls)
            if alive is None:
                _announce(sock, server.grpc_port, tls)
            reloading = loop.create_task(_reload(server, http, reload))
            await end.wait()
            reloading.cancel()
        seconds_left, lost = await _drain(server, http, hurry)
    finally:
        server.draining = True
        http.stop_accepting()
        await asyncio.gather(http.close(seconds_left), *([grpc.stop(seconds_left)] if grpc else []))
    await server.close()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a second signal must not change how this ends
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    return lost


async def _listen(server: Server, http: Listener, address: Address, tls: Tls | None) -> Any:
    grpc = None if address.grpc_port is None else await start_grpc(server, address.host, address.grpc_port, tls)
    http.start()
    return grpc


async def _load(server: Server, end: asyncio.Event) -> bool:
    """Open the models while /v2/health/live already answers. Returns False if the server is told to end meanwhile."""
    loading = asyncio.ensure_future(server.start())
    ending = asyncio.ensure_future(end.wait())
    await asyncio.wait({loading, ending}, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if not loading.done():
        loading.cancel()
        return False
    await loading
    return True


async def _reload(server: Server, http: Listener, reload: asyncio.Event) -> None:
    while await reload.wait():
        reload.clear()
        http.renew_certificate()  # gRPC reads the certificate itself
        await server.repository.reload_changed()


async def _drain(server: Server, http: Listener, hurry: asyncio.Event) -> tuple[float, int]:
    """Answer the accepted requests; return the seconds left for sending answers, and how many requests get none.

    hurry: ends the time in which load balancers can notice that the server is not ready.
    """
    limits, clock = server.limits, time.monotonic
    server.draining = True
    log.info("stopping: the server is not ready any more, and %d requests are in progress", server.counts.requests)
    with suppress(TimeoutError):
        await asyncio.wait_for(hurry.wait(), limits.grace_seconds)
    end = clock() + limits.drain_seconds
    http.stop_accepting()
    server.closing = True
    await asyncio.sleep(LAST_CALL)
    quiet = 0
    # requests may have arrived while this process was blocked, and are read first
    while quiet < QUIET and clock() < end:
        quiet = 0 if server.counts.requests or http.expecting else quiet + 1
        await asyncio.sleep(0.01)
    return max(end - clock(), 0.0), server.counts.requests


def _bound(host: str, port: int, option: str = "--port") -> socket.socket:
    with ExitStack() as stack:
        try:
            family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = stack.enter_context(socket.socket(family, kind, proto))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(BACKLOG)  # listen now, because another server could still take the port
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"cannot listen on {host} port {port}: {why}; choose another {option}") from None
        stack.pop_all()
    return sock


def _reserved(host: str, port: int) -> socket.socket:
    """Return a socket that reserves a port: until it is closed, only this user's processes can share the port."""
    with _bound(host, port, "--grpc-port") as free:
        where = free.getsockname()
    shared = socket.socket(free.family, free.type)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    shared.bind(where)
    return shared


def _announce(sock: socket.socket, grpc_port: int | None, tls: Tls | None, processes: int = 1) -> None:
    host, port = sock.getsockname()[:2]
    url = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
    grpc = "" if grpc_port is None else f", gRPC on port {grpc_port}"
    group = f", with {processes} processes" if processes > 1 else ""
    log.info("serving on %s%s%s; open this address in a browser to see the models", url, grpc, group)
