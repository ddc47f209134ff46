"""The gRPC listener, its limits, and the services that gRPC tools expect: grpc.health.v1 and reflection."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection as grpc_reflection
from grpc_reflection.v1alpha import reflection_pb2

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.grpc_calls import Call, Guard, Method
from mpdsgr_deploy.serving.grpc_methods import METHODS, SERVICE
from mpdsgr_deploy.serving.http_request import HEAD_BYTES
from mpdsgr_deploy.serving.listener import Tls
from mpdsgr_deploy.serving.refusals import Refused, Why, invalid

HEALTH = "grpc.health.v1.Health"
# both versions of reflection have the same messages
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
LOOK_EVERY = 0.5  # seconds after which Watch compares the status again
WATCHERS = 200  # the largest number of open streams of Watch, and of reflection
UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN = range(4)  # values of HealthCheckResponse.ServingStatus
STREAMS = 100  # calls of a connection at once; clients themselves delay further calls
SMALLEST_WINDOW = 65_535  # bytes, the window with which every HTTP/2 connection begins
LARGEST_WINDOW = 1 << 20  # bytes, the largest window


async def _check(server: Server, content: bytes, call: Call) -> Any:
    """Answer grpc.health.v1. A request names a model, or asks for the server by "" or SERVICE."""
    status = _status(server, _service(content))
    if status == SERVICE_UNKNOWN:
        raise Refused(Why.NOT_FOUND, "there is no such service; ask for the name of a model, or for the empty name")
    return health_pb2.HealthCheckResponse(status=status)


def _service(content: bytes) -> str:
    try:
        return str(health_pb2.HealthCheckRequest.FromString(content).service)
    except DecodeError:
        raise invalid("the message is not a HealthCheckRequest") from None


def _status(server: Server, service: str) -> int:
    if service in ("", SERVICE):
        return SERVING if server.ready else NOT_SERVING
    try:
        answers = server.repository.entry(service).model is not None
    except Refused:
        return SERVICE_UNKNOWN
    return SERVING if answers and not server.draining else NOT_SERVING


class Streams:
    """Calls that stay open until the server or the client ends them, at most WATCHERS at once."""

    def __init__(self, guard: Guard) -> None:
        self._guard, self._server, self._open = guard, guard.server, 0

    async def watch(self, _: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        """Yield a service's status now, and again whenever it changes."""
        async with self._guard.call("Watch", context, open=True) as call:
            service = _service(await self._guard.message(call, open=True))
            self._take()
        if call.refused:
            return
        before = None
        try:
            while True:
                status = _status(self._server, service)
                if status != before:
                    yield health_pb2.HealthCheckResponse(status=status)
                before = status
                if self._server.closing:
                    return
                await asyncio.sleep(LOOK_EVERY)
        finally:
            self._open -= 1

    async def reflect(self, _: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        """Yield the answers to a client's questions about services and their messages."""
        servicer = grpc_reflection.ReflectionServicer((SERVICE, HEALTH, *REFLECTION))
        async with self._guard.call("ServerReflectionInfo", context) as call:
            self._take()
        if call.refused:
            return
        try:
            while True:
                async with self._guard.call("ServerReflectionInfo", context) as call:
                    content = await self._guard.next_message(call)
                    if content is None:
                        return
                    try:
                        request = reflection_pb2.ServerReflectionRequest.FromString(content)
                    except DecodeError:
                        raise invalid("the message is not a ServerReflectionRequest") from None
                if call.refused:
                    return
                for answer in servicer.ServerReflectionInfo(iter([request]), context):
                    yield answer
        finally:
            self._open -= 1

    def _take(self) -> None:
        if self._open >= WATCHERS:
            raise Refused(Why.BUSY, "too many streams are open; try again later")
        self._open += 1


async def start_grpc(server: Server, host: str, port: int, tls: Tls | None) -> grpc.aio.Server:
    """Start to listen for gRPC, and set `server.grpc_port`; port 0 takes any free port.

    Raises InputError if the port cannot be used.
    """
    listening = grpc.aio.server(options=_options(server))
    guard = Guard(server)
    check = Method(_check, health_pb2.HealthCheckResponse.SerializeToString, open=True)
    watch, reflect = Streams(guard).watch, Streams(guard).reflect
    services = [
        guard.service(SERVICE, METHODS),
        guard.service(HEALTH, {"Check": check}),
        _service_of(HEALTH, "Watch", watch, health_pb2.HealthCheckResponse),
        *(
            _service_of(name, "ServerReflectionInfo", reflect, reflection_pb2.ServerReflectionResponse)
            for name in REFLECTION
        ),
    ]
    listening.add_generic_rpc_handlers((*services, Unknown(guard)))
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        server.grpc_port = listening.add_secure_port(where, tls.grpc()) if tls else listening.add_insecure_port(where)
    except RuntimeError as error:
        why = str(error).partition(";")[0]
        raise InputError(f"cannot listen for gRPC: {why}; choose another --grpc-port") from None
    await listening.start()
    return listening


def _service_of(name: str, method: str, handler: Any, response: Any) -> Any:
    """Return a service with one method, whose calls are streams of messages in both directions."""
    stream = grpc.stream_stream_rpc_method_handler(handler, response_serializer=response.SerializeToString)
    return grpc.method_handlers_generic_handler(name, {method: stream})


class Unknown(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Refuses calls of unknown methods, so that they are counted and logged."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def service(self, details: Any) -> Any:
        return grpc.stream_unary_rpc_method_handler(partial(self._refuse, details.method))

    async def _refuse(self, method: str, _: Any, context: grpc.aio.ServicerContext) -> None:
        async with self._guard.call(method, context):
            raise Refused(Why.METHOD, f"there is no method {method[:100]}")


def _options(server: Server) -> list[tuple[str, int]]:
    """Return the options of gRPC's core; its default limits are missing, or so low that honest clients reach them."""
    limits = server.limits
    calls = limits.connections * STREAMS
    window = min(max(limits.in_flight_bytes // limits.connections, SMALLEST_WINDOW), LARGEST_WINDOW)
    return [
        # bytes that a connection may send before they are read; gRPC's bandwidth probe would raise them to megabytes
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", window),
        ("grpc.max_receive_message_length", server.largest_message),
        ("grpc.max_metadata_size", HEAD_BYTES),
        ("grpc.server_handshake_timeout_ms", int(limits.header_seconds * 1000)),
        # otherwise a second server on the same port is a mistake
        ("grpc.so_reuseport", int(server.group.processes > 1)),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_connection_idle_ms", int(limits.keep_alive_seconds * 1000)),
        ("grpc.max_connection_age_ms", int(limits.connection_age_seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", int((limits.body_seconds + limits.request_seconds) * 1000)),
        ("grpc.max_concurrent_streams", STREAMS),
        # streams that were reset but not freed: beyond these the core refuses new ones of the connection, and with a
        # lower limit also bursts of honest clients
        ("grpc.http2.max_deallocating_streams", STREAMS),
        # calls that wait for this process; beyond these the core cancels some at random, which nothing counts
        ("grpc.server.max_pending_requests", calls),
        ("grpc.server.max_pending_requests_hard_limit", calls),
    ]
