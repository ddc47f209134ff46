"""What a server leaves in memory: nothing that only a garbage collection would find."""

import asyncio
import ctypes
import gc
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import uvloop
from served import BUNDLE, INFER, Connection, eventually, http, images, request
from served_clients import asked

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.grpc import start_grpc
from mpdsgr_deploy.serving.listener import Listener
from mpdsgr_deploy.serving.server import _bound
from mpdsgr_deploy.serving.settings import Limits, ServerSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from http2 import Http2, message

TIMES = 3  # that a client does it: what a single one leaves may be a cache
GOOD = request(images())
SILENT = 0.2  # seconds that a client has for a body or a message


class Running:
    """A server that runs in a thread of this process."""

    def __init__(self) -> None:
        limits = Limits(body_seconds=SILENT, keep_alive_seconds=1)
        self.server = Server([str(BUNDLE)], ServerSettings(limits=limits))
        self._ready, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=uvloop.run, args=(self._serve(),))
        self._thread.start()
        assert self._ready.wait(60)

    async def _serve(self) -> None:
        sock = _bound("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        listener = Listener(self.server, sock, None)
        listener.start()
        grpc = await start_grpc(self.server, "127.0.0.1", 0, None)
        self.grpc_port = self.server.grpc_port
        await self.server.start()
        self._ready.set()
        await asyncio.to_thread(self._end.wait)
        listener.stop_accepting()
        await asyncio.gather(listener.close(0), grpc.stop(0))
        await self.server.close()

    def end(self) -> None:
        self._end.set()
        self._thread.join()

    def ask(self, data: bytes) -> None:
        """Send this on a new connection, take what comes back, and close it."""
        with Connection(self.port) as connection:
            connection.send(data)
            connection.reply()

    def leave(self, data: bytes) -> None:
        """Send this on a new connection and close it."""
        with Connection(self.port) as connection:
            connection.send(data)

    def call(self, content: bytes, method: str = "ModelInfer") -> None:
        with Http2(self.grpc_port) as client:
            stream = client.open(method)
            client.send(stream, message(content))
            while stream not in client.answered | client.ended.keys() and client.read(5):
                pass

    def call_and_leave(self, content: bytes, *, reset: bool) -> None:
        with Http2(self.grpc_port) as client:
            stream = client.open("ModelInfer")
            client.send(stream, content, end=False)
            if reset:
                client.reset(stream)
                client.read(0.1)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    server = Running()
    gc.freeze()  # or every collection of these tests would look at all that earlier tests left
    yield server
    server.end()


def infer(body: Any = GOOD, **headers: object) -> bytes:
    return http("POST", INFER, body, {name.replace("_", "-"): value for name, value in headers.items()})


VALID = asked(1, "bundle").SerializeToString()
CASES: dict[str, Callable[[Running], None]] = {
    "an answer": lambda s: s.ask(infer()),
    "a page": lambda s: s.ask(http("GET", "/")),
    "metrics": lambda s: s.ask(http("GET", "/metrics")),
    "no HTTP": lambda s: s.ask(b"garbage\r\n\r\n"),
    "no JSON": lambda s: s.ask(infer(b"{")),
    "no model": lambda s: s.ask(http("POST", "/v2/models/nobody/infer", GOOD)),
    "bad pixels": lambda s: s.ask(infer({"inputs": [{**GOOD["inputs"][0], "data": [5.0] * 64}]})),
    "a deadline that passed": lambda s: s.ask(infer({**GOOD, "parameters": {"timeout": 1}})),
    "a body above the limit": lambda s: s.ask(infer(b"", Content_Length=10**9)),
    "a body that is late": lambda s: s.ask(infer()[:-5]),
    "a client that leaves in a body": lambda s: s.leave(infer()[:-5]),
    "a client that leaves without its answer": lambda s: s.leave(infer()),
    "pipelined requests without a reader": lambda s: s.leave(infer() * 20),
    "gRPC: an answer": lambda s: s.call(VALID),
    "gRPC: no request": lambda s: s.call(b"\x07"),
    "gRPC: no method": lambda s: s.call(b"", "Nothing"),
    "gRPC: a message above the limit": lambda s: s.call(bytes(200_000)),
    "gRPC: a message that is late": lambda s: s.call_and_leave(message(VALID)[:-1], reset=False),
    "gRPC: a call that is reset": lambda s: s.call_and_leave(message(VALID)[:-1], reset=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_request_leaves_nothing_for_a_garbage_collection(running: Running, name: str) -> None:
    """A cycle of a refusal and its frames holds the request's body, however many bytes that is."""
    assert found_by_a_collection(running, CASES[name]) == {}


def test_a_failure_leaves_nothing_either(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(running.server.repository.model("bundle"), "_predictor", fail)
    for case in ("an answer", "gRPC: an answer"):
        assert found_by_a_collection(running, CASES[case]) == {}


HEAPS = """
import ctypes, sys, threading
from mpdsgr_deploy.allocator import limit_free_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
limit_free_memory()
libc.free(ctypes.c_void_p(libc.malloc(1 << 24)))  # from then on glibc would keep smaller ones
libc.malloc(2_000_000)
all_there = threading.Barrier(8)
threads = [threading.Thread(target=lambda: (all_there.wait(), libc.malloc(100), all_there.wait())) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not glibc")
def test_freed_memory_goes_back_to_the_system(tmp_path: Path) -> None:
    def heaps(**environment: str) -> tuple[int, int]:
        """How many there are for eight threads, and how many blocks stand outside of them."""
        told = tmp_path / "heaps.xml"
        subprocess.run([sys.executable, "-c", HEAPS, told], check=True, env={**os.environ, **environment})
        text = told.read_text()
        (mapped,) = re.findall(r'type="mmap" count="(\d+)"', text)
        return text.count("<heap "), int(mapped)

    count, mapped = heaps()
    assert count <= 2
    of_the_user = heaps(MALLOC_ARENA_MAX="5", MALLOC_MMAP_THRESHOLD_="10000000")
    assert of_the_user[0] == 5
    assert of_the_user[1] < mapped


def found_by_a_collection(running: Running, case: Callable[[Running], None]) -> dict[str, int]:
    """What of this package's, by type, is garbage once the case is over; frames are by the function's name."""
    with ExitStack() as stack:
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        for _ in range(TIMES):
            with suppress(ConnectionError):
                case(running)
        assert eventually(lambda: not running.server.counts.requests and not running.server.counts.connections)
        stack.callback(gc.garbage.clear)
        stack.callback(gc.set_debug, 0)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return dict(Counter(filter(None, map(name_of_own, gc.garbage))))


def name_of_own(found: object) -> str:
    """Of an object that is this package's, or one of its frames; "" for another's."""
    if isinstance(found, FrameType):
        return found.f_code.co_qualname if "mpdsgr_deploy" in found.f_code.co_filename else ""
    kind = type(found)
    return kind.__name__ if str(kind.__module__).startswith("mpdsgr_deploy") else ""  # some types have no text there
