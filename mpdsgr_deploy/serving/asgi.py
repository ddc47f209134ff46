"""The server as an ASGI application, for other listeners than that of this package, for example Ray Serve's."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.http import Exchange, Http, response_headers
from mpdsgr_deploy.serving.refusals import Refused, Why

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class AsgiBody:
    """The `Body` of a request that arrives in ASGI messages."""

    def __init__(self, receive: Receive, *, at_end: bool) -> None:
        self._receive, self.at_end, self.complete = receive, at_end, at_end
        self._watching: asyncio.Task[None] | None = None

    async def read(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Refused(Why.CANCELLED, "the client disconnected before its body had arrived")
        self.at_end = not message.get("more_body", False)
        body: bytes = message.get("body", b"")
        return body

    def watch(self, on_disconnect: Callable[[], None] | None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._watching = None if on_disconnect is None else asyncio.ensure_future(self._wait(on_disconnect))

    async def _wait(self, on_disconnect: Callable[[], None]) -> None:
        await self._receive()  # after the body, the only message is that of a disconnect
        on_disconnect()


class Asgi:
    """The ASGI application of a server whose models are loaded; the end of its lifespan closes the server.

    with_id: whether responses have the header x-request-id, which Ray adds itself.
    """

    def __init__(self, server: Server, *, with_id: bool = True) -> None:
        self.server, self._http, self._with_id = server, Http(server), with_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self.server.close()
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "http":
            await self._exchange(scope, receive, send)

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        is_empty = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        body = AsgiBody(receive, at_end=is_empty)
        client = scope.get("client") or ("",)
        exchange = Exchange(scope["method"], scope["path"], headers, body, lambda: str(client[0]))
        reply = await self._http.answer(exchange)
        lines = [line for line in response_headers(exchange.id, reply) if self._with_id or line[0] != b"x-request-id"]
        if self.server.draining or not body.at_end:  # close the connection instead of reading the rest of a body
            lines.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": reply.status, "headers": lines})
        await send({"type": "http.response.body", "body": b"" if exchange.method == "HEAD" else reply.body})
