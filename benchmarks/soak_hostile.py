"""The hostile clients of soak.py: each takes what it can get of a server, and must meet the server's bound on it."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress

from http2 import Http2, message
from soak_traffic import Counts

CONNECTIONS = 200  # that the server allows, over HTTP and over gRPC
SECONDS = {"header": 1.0, "body": 2.0}  # that it gives a client for them
LIMITS = {"connections": CONNECTIONS, **{f"{part}_seconds": seconds for part, seconds in SECONDS.items()}}
FLOOD = 210  # connections of one client
PATIENCE = 10.0  # seconds until the server should have ended what is too slow
STREAMS = 300  # calls without a message
Attack = Callable[[], Awaitable[None]]


class HttpAttacks:
    """Attacks on the HTTP port. infer: a whole valid inference request; counts: where a missed bound is noted."""

    def __init__(self, host: str, port: int, infer: bytes, counts: Counts) -> None:
        self._where, self._infer, self._counts = (host, port), infer, counts
        self._head = infer[: infer.index(b"\r\n\r\n") + 4]

    def all(self) -> dict[str, Attack]:
        """By name."""
        return {
            "half a head": lambda: self._ends(self._head[:-10], b"408"),
            "half a body": lambda: self._ends(self._infer[:-10], b"408"),
            "a dripping head": lambda: self._ends(self._head[:20], b"408", drops=self._head[20:-10]),
            "a dripping body": lambda: self._ends(self._infer[:-100], b"408", drops=self._infer[-100:-1]),
            "a head of 1 MB": lambda: self._ends(self._head[:-2] + b"X: " + b"x" * (1 << 20), b"431"),
            "a body above the limit": lambda: self._ends(_too_long(self._head) + bytes(1 << 16), b"413"),
            "answers that nobody reads": self._unread,
            "a flood of connections": self._flood,
        }

    async def _ends(self, part: bytes, status: bytes, drops: bytes = b"") -> None:
        """Send a part, then drop by drop; the server must answer with the status and close in its time."""
        reader, writer = await asyncio.open_connection(*self._where)
        dripping = asyncio.create_task(_drip(writer, drops))
        start, answer = time.monotonic(), b""
        try:
            with suppress(ConnectionError):
                writer.write(part)
                async with asyncio.timeout(PATIENCE):
                    while data := await reader.read(1 << 16):
                        answer += data
        except TimeoutError:
            self._counts.failed("hostile", f"not ended after {PATIENCE:g} s: {part[:60]!r}")
        finally:
            dripping.cancel()
            writer.transport.abort()
        if answer and answer[9:12] not in (status, b"503"):
            self._counts.failed("hostile", f"{answer[:80]!r} in {time.monotonic() - start:.1f} s, not {status!r}")

    async def _unread(self) -> None:
        """Ask for large answers until the buffers are full, take none of them, and stay."""
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            with suppress(OSError, TimeoutError):
                await loop.sock_connect(sock, self._where)
                async with asyncio.timeout(SECONDS["body"]):
                    while True:
                        await loop.sock_sendall(sock, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 60)

    async def _flood(self) -> None:
        with ExitStack() as stack:
            for _ in range(FLOOD):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(self._where)
            await asyncio.sleep(0.3)


class GrpcAttacks:
    """Attacks on the gRPC port, by frames that no library sends. They block, so each has a thread."""

    def __init__(self, port: int, counts: Counts) -> None:
        self._port, self._counts = port, counts

    def all(self) -> dict[str, Attack]:
        """By name."""
        names = ("half_a_message", "calls_without_a_message", "resets", "a_large_head", "unread", "flood")
        return {f"gRPC, {name.replace('_', ' ')}": lambda name=name: self._threaded(name) for name in names}

    async def _threaded(self, name: str) -> None:
        with suppress(OSError):  # the server has closed the connection: that is its right
            await asyncio.to_thread(getattr(self, f"_{name}"))

    def _half_a_message(self) -> None:
        with Http2(self._port) as client:
            stream, end = client.open("ModelInfer"), time.monotonic() + PATIENCE
            client.send(stream, message(bytes(10_000))[:-1], end=False)
            while stream not in client.answered | client.ended.keys() and not client.gone:
                client.read(0.5)
                if time.monotonic() > end:
                    self._counts.failed("hostile", f"half a message still waits after {PATIENCE:g} s")
                    return

    def _calls_without_a_message(self) -> None:
        with Http2(self._port) as client:
            for _ in range(STREAMS):
                client.open("ModelInfer")
            client.read(0.5)

    def _resets(self) -> None:
        with Http2(self._port) as client:
            for _ in range(10):
                for _ in range(50):
                    client.reset(client.open("ModelInfer"))
                client.read(0.01)

    def _a_large_head(self) -> None:
        with Http2(self._port) as client:
            client.open("ModelInfer", **{f"x-{number}": "x" * 120 for number in range(800)})
            client.read(0.5)

    def _unread(self) -> None:
        with Http2(self._port) as client:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for _ in range(200):
                client.open("ServerMetadata", end=True)
            time.sleep(SECONDS["body"])

    def _flood(self) -> None:
        with ExitStack() as stack:
            for _ in range(FLOOD):
                stack.enter_context(Http2(self._port))
            time.sleep(0.3)


def _too_long(head: bytes) -> bytes:
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"content-length")]
    return b"\r\n".join([*lines, b"Content-Length: 10000000000", b"", b""])


async def _drip(writer: asyncio.StreamWriter, drops: bytes) -> None:
    for drop in drops:
        await asyncio.sleep(0.1)
        writer.write(bytes([drop]))
