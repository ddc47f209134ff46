"""What every gRPC call has in common: the check of keys, limits on its message, counting and the log."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import grpc
import grpc.aio

from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.http_timer import READ_FIRST, client_time
from mpdsgr_deploy.serving.refusals import Refused, Why, internal, invalid
from mpdsgr_deploy.serving.served_model import ServedModel
from mpdsgr_deploy.serving.tensors import JSON_ENVELOPE

PATIENCE = 1.0  # seconds in which all waiting messages should get a place
Content = TypeVar("Content")
OPEN_PLACES = 8  # the largest number of messages without a key that arrive at the same time
WAITING = 1000  # the largest number of calls whose messages wait to arrive
SMALL = 4096  # the largest message, in bytes, to a method that needs no key


class Arrivals:
    """Lets at most `places` messages arrive at once, so that together they fit into the memory reserved for them.

    At most WAITING others wait for a place. While any do, the time for an arrival is limited so that all get a place
    within about PATIENCE: clients that send slowly, or nothing, delay nobody for longer.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._arriving: dict[asyncio.Timeout, float] = {}  # start time of each, the oldest first
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._places_used = 0
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, receive: Callable[[], Awaitable[Content]], seconds: float) -> Content:
        """Return the result of `receive`. Raises Refused after `seconds`, or if too many messages wait."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as timeout:
                with client_time(timeout, seconds):
                    await self._enter()
                    self._arriving[timeout] = loop.time()
                    try:
                        if self._waiting and self._timer is None:
                            self._hurry()
                        return await receive()
                    finally:
                        self._arriving.pop(timeout, None)
                        self._leave()
        except TimeoutError:
            raise Refused(Why.SLOW, "the message did not arrive in time") from None

    async def _enter(self) -> None:
        if self._places_used < self.places and not self._waiting:
            self._places_used += 1
            return
        if len(self._waiting) >= WAITING:
            raise Refused(Why.BUSY, "too many messages are being received; try again later")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if self._timer is None:
            self._hurry()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it got a place at the same moment
                self._leave()
            with suppress(ValueError):
                self._waiting.remove(turn)
            raise

    def _leave(self) -> None:
        """Give the place to the message that has waited longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._places_used -= 1

    def _hurry(self) -> None:
        """End the oldest arrivals that exceed their time, at most as many as messages wait; schedule a new check."""
        self._timer = None
        loop = asyncio.get_running_loop()
        now, needed = loop.time(), len(self._waiting)
        patience = PATIENCE / (1 + needed / self.places)
        for timeout, began in list(self._arriving.items()):
            if not needed:
                break
            if now - began < patience:
                self._timer = loop.call_later(began + patience - now + 0.001, self._hurry)
                break
            del self._arriving[timeout]
            timeout.reschedule(now + READ_FIRST)
            needed -= 1
        if self._timer is None and needed:
            self._timer = loop.call_later(patience, self._hurry)


class Call:
    """One gRPC call, as a `RequestLog`. model: the one it reached, if any; refused: why it was refused, if it was."""

    method = "gRPC"

    def __init__(self, path: str, context: grpc.aio.ServicerContext, fallback_id: str) -> None:
        self.path, self.context = path, context
        self.metadata: Mapping[str, str] = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        self.id = self.metadata.get("x-request-id", "")[:128] or fallback_id
        self.model: ServedModel | None = None
        self.refused: Refused | None = None
        self.images = 0
        self.start = time.monotonic()

    @property
    def peer(self) -> str:
        return str(self.context.peer())


class Method(NamedTuple):
    """A gRPC method. answer: maps the bytes of a message to the response; serialize: encodes the response."""

    answer: Callable[[Server, bytes, Call], Awaitable[Any]]
    serialize: Callable[[Any], bytes]
    open: bool = False  # it needs no key
    reads: bool = True  # its calls have a message
    large: bool = False  # a message may be as large as an inference request


class Guard:
    """Checks the key and the message of every call before its method, and counts and logs the call."""

    def __init__(self, server: Server) -> None:
        self.server = server
        limits = server.limits
        places = max(1, limits.in_flight_bytes // server.largest_message)
        self._arrivals = Arrivals(min(places, WAITING))
        self._open_arrivals = Arrivals(min(places, OPEN_PLACES))

    def service(self, name: str, methods: Mapping[str, Method]) -> Any:
        """Return a service for grpc.aio. It takes calls as streams, so that the wait for a message is limited here."""
        handlers = {
            method: grpc.stream_unary_rpc_method_handler(
                partial(self._unary, method, entry), response_serializer=entry.serialize
            )
            for method, entry in methods.items()
        }
        return grpc.method_handlers_generic_handler(name, handlers)

    async def _unary(self, name: str, method: Method, _: Any, context: grpc.aio.ServicerContext) -> Any:
        if context.done():  # the call was reset while it waited
            self.server.other_codes["grpc", Why.CANCELLED.grpc] += 1
            raise asyncio.CancelledError
        async with self.call(name, context, open=method.open) as call:
            if not method.reads:
                return await method.answer(self.server, b"", call)
            content = await self.message(call, open=method.open, large=method.large)
            with self.server.memory.share() as share:
                share.take(len(content))
                return await method.answer(self.server, content, call)

    @asynccontextmanager
    async def call(self, name: str, context: grpc.aio.ServicerContext, *, open: bool = False) -> AsyncIterator[Call]:
        """Provide the Call of a with block: refuse it without a key, count and log it, and end it if it was refused.

        open: no key is needed. A Refused or any other error in the block ends the call with that status.
        """
        server = self.server
        call = Call(name, context, server.new_id())
        server.counts.requests += 1
        try:
            if not open:
                if server.closing:  # when gRPC stops, it would itself cancel calls that it has not passed on
                    raise Refused(Why.NOT_READY, "the server is stopping")
                server.authorize(call.metadata.get("authorization", ""))
            yield call
        except Refused as error:
            call.refused = error.without_frames()
        except asyncio.CancelledError:
            call.refused = Refused(Why.CANCELLED, "the client disconnected")
            raise
        except Exception as error:
            log.exception("call %s failed", call.id)
            call.refused = internal(error)
        finally:
            server.counts.requests -= 1
            code = "OK" if call.refused is None else call.refused.why.grpc
            server.count("grpc", call, code, call.refused)
        if call.refused is not None:
            await _abort(context, call.refused)

    async def message(self, call: Call, *, open: bool = False, large: bool = False) -> bytes:
        """Return a call's message. Raises Refused if it is late, missing, or larger than its method allows.

        open, large: those of `Method`.
        """
        content = await self.next_message(call, open=open, large=large)
        if content is None:
            if not call.peer:  # gRPC's core has ended the call: its message was too large, or the client has left
                raise Refused(Why.TOO_LARGE, "the message did not arrive completely")
            raise invalid("the call has no message")
        return content

    async def next_message(self, call: Call, *, open: bool = False, large: bool = False) -> bytes | None:
        """Return a stream's next message, or None at its end. Raises Refused as `message` does."""
        arrivals = self._open_arrivals if open else self._arrivals
        content = await arrivals.read(call.context.read, self.server.limits.body_seconds)
        if not isinstance(content, bytes):  # the client has closed its side
            return None
        most = SMALL if open else self.server.largest_message if large else JSON_ENVELOPE
        if len(content) > most:
            raise Refused(Why.TOO_LARGE, f"a message to {call.path} may have at most {most} bytes")
        return content


async def _abort(context: grpc.aio.ServicerContext, refused: Refused) -> None:
    """End a call with a status. The library raises AbortError again once the call's handler has returned.

    The library stores that error with the call, and the error's frames hold the call and its message. Without the
    frames there is no cycle that would stay in memory until a garbage collection.
    """
    try:
        await context.abort(getattr(grpc.StatusCode, refused.why.grpc), str(refused))
    except grpc.aio.AbortError as error:
        error.__traceback__ = error.__context__ = None
