"""The server's application in this process, asked as an ASGI server would ask it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.asgi import Asgi


@asynccontextmanager
async def started(*arguments: Any, **options: Any) -> AsyncIterator[Server]:
    """A server with its models loaded, for the length of an `async with` block."""
    server = Server([*map(str, arguments)], **options)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


class Answer(NamedTuple):
    """Of the application; headers by name in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One that sends whole bodies and waits for its answer, until it leaves."""

    def __init__(self, server: Server) -> None:
        self._app = Asgi(server)
        self._left = asyncio.Event()

    def leave(self) -> None:
        self._left.set()

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.ask("GET", path, b"", **headers)

    async def post(self, path: str, body: bytes | dict[str, Any], **headers: str) -> Answer:
        return await self.ask("POST", path, body, **headers)

    async def ask(self, method: str, path: str, body: bytes | dict[str, Any], **headers: str) -> Answer:
        """headers: their names with _ for -."""
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        unread = [content]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if unread:
                return {"type": "http.request", "body": unread.pop()}
            await self._left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        told = [(name.lower().replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        told.append((b"content-length", str(len(content)).encode()))
        await self._app({"type": "http", "method": method, "path": path, "headers": told}, receive, send)
        start, end = sent
        return Answer(start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, end["body"])
