"""The gRPC listener and its bounds."""

from functools import partial
from typing import Any, Self

import grpc
import grpc.aio

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.errors import Refused, Why
from mpdsgr_deploy.serving.grpc_calls import Guard
from mpdsgr_deploy.serving.grpc_health import health, reflection
from mpdsgr_deploy.serving.grpc_methods import METHODS, SERVICE
from mpdsgr_deploy.serving.http_wire import HEAD_BYTES
from mpdsgr_deploy.serving.listener import Tls

STREAMS = 100  # calls of a connection at once; clients hold back further ones themselves
SMALLEST_WINDOW = 65_535  # bytes; HTTP/2's own, with which every connection begins
LARGEST_WINDOW = 1 << 20  # bytes


class Grpc:
    """A running gRPC server; make it with `start`."""

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self._server, self.port = server, port

    @classmethod
    async def start(cls, server: Server, host: str, port: int, tls: Tls | None) -> Self:
        """Listen. Raises InputError if the port cannot be used."""
        inner = grpc.aio.server(options=_options(server))
        guard = Guard(server)
        services = (guard.service(SERVICE, METHODS), *health(guard), *reflection(guard))
        inner.add_generic_rpc_handlers((*services, Unknown(guard)))
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = inner.add_secure_port(where, tls.grpc()) if tls else inner.add_insecure_port(where)
        except RuntimeError as error:
            why = str(error).partition(";")[0]
            raise InputError(f"cannot listen for gRPC: {why}; choose another --grpc-port") from None
        await inner.start()
        server.grpc_port = bound
        return cls(inner, bound)

    async def stop(self, seconds: float) -> None:
        """Accept no more calls, and wait so many seconds for those in progress."""
        await self._server.stop(seconds)


class Unknown(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Refuses calls of unknown methods, so that such calls are counted and logged."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def service(self, details: Any) -> Any:
        return grpc.stream_unary_rpc_method_handler(partial(self._refuse, details.method))

    async def _refuse(self, method: str, _: Any, context: grpc.aio.ServicerContext) -> None:
        async with self._guard.call(method, context):
            raise Refused(Why.METHOD, f"there is no method {method[:100]}")


def _options(server: Server) -> list[tuple[str, int]]:
    """Return the limits of gRPC's core, whose defaults are unbounded, or so low that honest clients reach them."""
    limits = server.limits
    calls = limits.connections * STREAMS
    window = min(max(limits.in_flight_bytes // limits.connections, SMALLEST_WINDOW), LARGEST_WINDOW)
    return [
        # bytes that a connection may send before they are read; a probe of the network would let them grow to megabytes
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", window),
        ("grpc.max_receive_message_length", server.largest_message),
        ("grpc.max_metadata_size", HEAD_BYTES),
        ("grpc.server_handshake_timeout_ms", int(limits.header_seconds * 1000)),
        ("grpc.so_reuseport", int(server.group.processes > 1)),  # a second server on the same port is a mistake
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_connection_idle_ms", int(limits.keep_alive_seconds * 1000)),
        ("grpc.max_connection_age_ms", int(limits.connection_age_seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", int((limits.body_seconds + limits.request_seconds) * 1000)),
        ("grpc.max_concurrent_streams", STREAMS),
        # of streams that were reset: more make the core refuse new ones of that connection, fewer also honest bursts
        ("grpc.http2.max_deallocating_streams", STREAMS),
        # calls that wait for this process; beyond it the core cancels some at random, uncounted
        ("grpc.server.max_pending_requests", calls),
        ("grpc.server.max_pending_requests_hard_limit", calls),
    ]
