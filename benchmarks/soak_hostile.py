"""The hostile clients of soak.py: each takes what it can get of a server, and must meet the server's bound on it."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress

from http2 import Http2, message
from soak_traffic import MARGIN, Counts

CONNECTIONS = 200  # that the server allows, over HTTP and over gRPC
SECONDS = {"header": 1.0, "body": 2.0, "keep_alive": 2.0}  # that it gives a client for them
LIMITS = {"connections": CONNECTIONS, **{f"{part}_seconds": seconds for part, seconds in SECONDS.items()}}
FLOOD = 210  # connections of one client
PATIENCE = 10.0  # seconds, on the server's own clock, until it should have ended what is too slow
STREAMS = 300  # calls without a message
ENTRIES = 300_000  # empty ones in a message that is not too large as a whole
LARGE = 20_000_000  # bytes of a message above every limit
LET_THROUGH = (1 << 20) + 5  # bytes of it that the largest window takes in, and a message's head, which is read
IDLE = 20  # connections that say nothing
PROBE_EVERY, PROBE_GAP = 0.5, 5.0  # seconds between two probes, and at most between two that are answered
Attack = Callable[[], Awaitable[None]]
Clock = Callable[[], float]  # seconds; stands still while the server gets no CPU, for which it cannot be blamed


class HttpAttacks:
    """Attacks on the HTTP port. infer: a whole valid inference request; counts: where a missed bound is noted."""

    def __init__(self, host: str, port: int, infer: bytes, counts: Counts, clock: Clock) -> None:
        self._where, self._infer, self._counts, self._clock = (host, port), infer, counts, clock
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
            "a connection that says nothing more": self._idle,
            "a flood of connections": self._flood,
        }

    async def _ends(self, part: bytes, status: bytes, drops: bytes = b"") -> None:
        """Send a part, then drop by drop; the server must answer with the status and close in its time.

        Where this process was held up before it could send, the server's time is over, and nothing is learnt.
        """
        opened = time.monotonic()
        reader, writer = await asyncio.open_connection(*self._where)
        if time.monotonic() - opened > MARGIN * SECONDS["header"]:
            writer.transport.abort()
            return
        dripping = asyncio.create_task(_drip(writer, drops))
        start, answer = self._clock(), b""
        try:
            with suppress(ConnectionError):
                writer.write(part)
                answer = await self._until_closed(reader, PATIENCE)
        except TimeoutError:
            self._counts.failed("hostile", f"not ended after {PATIENCE:g} s: {part[:60]!r}")
        finally:
            dripping.cancel()
            writer.transport.abort()
        if answer and answer[9:12] not in (status, b"503"):
            self._counts.failed("hostile", f"{answer[:80]!r} in {self._clock() - start:.1f} s, not {status!r}")

    async def _until_closed(self, reader: asyncio.StreamReader, seconds: float) -> bytes:
        """What comes until the server closes the connection. Raises TimeoutError after so many seconds of its own."""
        end, answer = self._clock() + seconds, b""
        while True:
            try:
                async with asyncio.timeout(1):
                    data = await reader.read(1 << 16)
            except TimeoutError:
                if self._clock() > end:
                    raise
                continue
            if not data:
                return answer
            answer += data

    async def _idle(self) -> None:
        """Ask once, and keep the connection."""
        reader, writer = await asyncio.open_connection(*self._where)
        try:
            with suppress(ConnectionError):
                writer.write(self._infer)
                await self._until_closed(reader, SECONDS["keep_alive"] + PATIENCE)
        except TimeoutError:
            self._counts.failed("hostile", "a connection that says nothing is still open")
        finally:
            writer.transport.abort()

    async def probe(self) -> None:
        """What Kubernetes does: ask for liveness on a new connection, time after time, until this is cancelled."""
        answered = self._clock()
        while True:
            writer = None
            try:
                with suppress(OSError, TimeoutError):
                    async with asyncio.timeout(PROBE_GAP):
                        reader, writer = await asyncio.open_connection(*self._where)
                        writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                        if (await reader.read(1 << 16))[9:12] == b"200":
                            answered = self._clock()
                            self._counts.kinds["probe"] += 1
            finally:
                if writer is not None:
                    writer.transport.abort()
            if self._clock() - answered > PROBE_GAP:
                self._counts.failed("hostile", f"no probe was answered for {PROBE_GAP:g} s")
                answered = self._clock()
            await asyncio.sleep(PROBE_EVERY)

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

    def __init__(self, port: int, counts: Counts, clock: Clock) -> None:
        self._port, self._counts, self._clock = port, counts, clock

    def all(self) -> dict[str, Attack]:
        """By name."""
        names = (
            *("half_a_message", "calls_without_a_message", "resets", "a_large_head", "unread", "flood", "idle"),
            *("empty_inputs", "empty_outputs", "a_message_above_the_limit", "a_large_message_without_a_key"),
        )
        return {f"gRPC, {name.replace('_', ' ')}": lambda name=name: self._threaded(name) for name in names}

    async def _threaded(self, name: str) -> None:
        with suppress(OSError):  # the server has closed the connection: that is its right
            await asyncio.to_thread(getattr(self, f"_{name}"))

    def _half_a_message(self) -> None:
        with Http2(self._port) as client:
            stream, end = client.open("ModelInfer"), self._clock() + PATIENCE
            client.send(stream, message(bytes(10_000))[:-1], end=False)
            while stream not in client.answered | client.ended.keys() and not client.gone:
                client.read(0.5)
                if self._clock() > end:
                    self._counts.failed("hostile", f"half a message still waits after {PATIENCE:g} s")
                    return

    def _calls_without_a_message(self) -> None:
        with Http2(self._port) as client:
            for _ in range(STREAMS):
                client.open("ModelInfer")
            client.read(0.5)

    def _empty_inputs(self) -> None:
        self._whole("ModelInfer", b"\x2a\0" * ENTRIES)  # the field's number and type, and a length of 0

    def _empty_outputs(self) -> None:
        self._whole("ModelInfer", b"\x32\0" * ENTRIES)

    def _a_message_above_the_limit(self) -> None:
        self._whole("ModelInfer", bytes(LARGE))

    def _a_large_message_without_a_key(self) -> None:
        self._whole("ServerLive", bytes(LARGE))

    def _whole(self, method: str, content: bytes) -> None:
        """A message that must be answered or refused soon, and is not taken in if it is too large."""
        with Http2(self._port) as client:
            stream, start = client.open(method), self._clock()
            sent = client.send(stream, message(content))
            while stream not in client.answered | client.ended.keys() and not client.gone:
                client.read(0.5)
                if self._clock() - start > PATIENCE:
                    break
            if (seconds := self._clock() - start) > PATIENCE or sent > LET_THROUGH:
                self._counts.failed("hostile", f"{len(content)} bytes to {method}: {sent} in {seconds:.1f} s")

    def _idle(self) -> None:
        with ExitStack() as stack:
            clients = [stack.enter_context(Http2(self._port)) for _ in range(IDLE)]
            end = self._clock() + SECONDS["keep_alive"] + PATIENCE
            while (waiting := [client for client in clients if not client.gone]) and self._clock() < end:
                waiting[0].read(0.5)
            if waiting:
                self._counts.failed("hostile", f"{len(waiting)} connections that say nothing are still open")

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
