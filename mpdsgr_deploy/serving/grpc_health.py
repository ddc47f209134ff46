"""The further services that gRPC tools expect: grpc.health.v1, and reflection."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection as grpc_reflection
from grpc_reflection.v1alpha import reflection_pb2

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.errors import Refused, Why, invalid
from mpdsgr_deploy.serving.grpc_calls import Call, Guard, Method
from mpdsgr_deploy.serving.grpc_methods import SERVICE

HEALTH = "grpc.health.v1.Health"
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")  # the same messages
LOOK_EVERY = 0.5  # seconds between two looks of a Watch
WATCHERS = 200  # streams of Watch and of reflection
UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN = range(4)  # of HealthCheckResponse.ServingStatus


def health(guard: Guard) -> list[Any]:
    """Return the health services for grpc.aio. A request names "", the protocol's service, or a model."""
    streams = Streams(guard)
    check = guard.service(
        HEALTH, {"Check": Method(_check, health_pb2.HealthCheckResponse.SerializeToString, open=True)}
    )
    watch = grpc.stream_stream_rpc_method_handler(
        streams.watch, response_serializer=health_pb2.HealthCheckResponse.SerializeToString
    )
    return [check, grpc.method_handlers_generic_handler(HEALTH, {"Watch": watch})]


def reflection(guard: Guard) -> list[Any]:
    """Return both versions of the reflection service for grpc.aio."""
    reflect = grpc.stream_stream_rpc_method_handler(
        Streams(guard).reflect, response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString
    )
    return [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": reflect}) for name in REFLECTION]


async def _check(server: Server, content: bytes, call: Call) -> Any:
    status = _status(server, _service(content))
    if status == SERVICE_UNKNOWN:
        raise Refused(Why.NOT_FOUND, "no such service; ask for a model, or for the empty name")
    return health_pb2.HealthCheckResponse(status=status)


def _service(content: bytes) -> str:
    try:
        return str(health_pb2.HealthCheckRequest.FromString(content).service)
    except DecodeError:
        raise invalid("the message is no HealthCheckRequest") from None


def _status(server: Server, service: str) -> int:
    if service in ("", SERVICE):
        return SERVING if server.ready else NOT_SERVING
    try:
        answers = server.repository.entry(service).model is not None
    except Refused:
        return SERVICE_UNKNOWN
    return SERVING if answers and not server.draining else NOT_SERVING


class Streams:
    """Calls that stay open, at most WATCHERS of them; they end with the server."""

    def __init__(self, guard: Guard) -> None:
        self._guard, self._server, self._open = guard, guard.server, 0

    async def watch(self, _: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        """Send a service's status now, and again whenever it changes."""
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
        """Answer a client's questions about the services and their messages."""
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
                        raise invalid("the message is no ServerReflectionRequest") from None
                if call.refused:
                    return
                for answer in servicer.ServerReflectionInfo(iter([request]), context):
                    yield answer
        finally:
            self._open -= 1

    def _take(self) -> None:
        if self._open >= WATCHERS:
            raise Refused(Why.BUSY, "too many streams are open; ask again soon")
        self._open += 1
