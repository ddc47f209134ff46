"""What a server lets a client take of its time: slow, silent and late clients. Good requests go on through."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import grpc
import pytest
from bounded import CONNECTIONS, EXHAUSTED, GOOD, LATE, QUEUED, SERVICE, X, assert_right, channel, dropped, infer
from served import INFER, LARGE, Connection, Served, eventually, http, request
from served_clients import asked

HASTY = {
    "header_seconds": 0.6,
    "body_seconds": 0.8,
    "request_seconds": 0.2,
    "keep_alive_seconds": 0.5,
    "connection_age_seconds": 1,
}


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With little time for anything."""
    limits = {"batch": LARGE, "connections": CONNECTIONS, **HASTY}
    with Served(limits=limits, gate=tmp_path_factory.mktemp("hasty") / "gate") as served:
        yield served
        assert served.alive
        assert not [line for line in served.lines if line["level"] in ("error", "critical", "")]


def test_a_deadline_in_the_queue(hasty: Served) -> None:
    with hasty.connect() as late:
        with hasty.hold():
            late.send(GOOD)
            assert eventually(lambda: hasty.metrics()[QUEUED] == 1)
            time.sleep(HASTY["request_seconds"])
        refused = late.reply()
    assert (refused.status, "deadline passed after" in refused.json()["error"]) == (504, True)
    assert dropped(hasty, "deadline") == 1
    assert_right(hasty.ask(GOOD))


def drip(connection: Connection, data: bytes, end: threading.Event) -> None:
    """A byte now and then, as long as somebody takes them."""
    for byte in data:
        if end.wait(0.1):
            return
        with suppress(OSError):  # the test may have closed it meanwhile
            connection.send(bytes([byte]))


SLOW = {  # what is sent at once, and then drop by drop
    "nothing": (b"", b""),
    "half a head": (GOOD[:20], b""),
    "a dripping head": (GOOD[:20], GOOD[20:120]),
    "no body": (GOOD[: GOOD.index(b"\r\n\r\n") + 4], b""),
    "half a body": (GOOD[:-20], b""),
    "a dripping body": (GOOD[:-100], GOOD[-100:]),
    "half a chunk": (http("POST", INFER, b"5\r\nabc", {"Transfer-Encoding": "chunked"}), b""),
    "dripping chunks": (http("POST", INFER, b"", {"Transfer-Encoding": "chunked"}), b"1\r\na\r\n" * 20),
    "dripping trailers": (http("POST", INFER, b"0\r\n", {"Transfer-Encoding": "chunked"}), b"a: b\r\n" * 20),
}


def test_slow_clients(hasty: Served) -> None:
    """All at once; each is told so in its time, while others are answered."""
    end = threading.Event()
    with ExitStack() as stack:
        stack.callback(end.set)
        start, found, threads = time.monotonic(), {}, []
        for name, (data, drops) in SLOW.items():
            connection = stack.enter_context(hasty.connect())
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.send(data)
            found[name] = connection
            threads.append(threading.Thread(target=drip, args=(connection, drops, end)))
            threads[-1].start()
        assert_right(hasty.ask(GOOD))
        for name, connection in found.items():
            reply = connection.reply()
            assert (name, reply.status) == (name, 408)
            assert connection.closed()
        assert time.monotonic() - start > 0.5
        end.set()
    assert eventually(lambda: hasty.metrics()["mpdsgr_connections"] == 1)


def test_a_server_that_was_held_up_does_not_blame_the_client(hasty: Served) -> None:
    """What a client sent in time is answered, even if the server was not there to read it in time."""
    message = http("POST", INFER, request(X))
    head = message.index(b"\r\n\r\n") + 4
    service = grpc.insecure_channel(hasty.grpc).stream_unary(f"{SERVICE}ModelInfer")
    go = threading.Event()

    def late() -> Iterator[bytes]:
        go.wait()
        yield asked(1, "bundle").SerializeToString()

    with ExitStack() as stack:
        connections = [stack.enter_context(hasty.connect()) for _ in range(4)]
        fresh, in_head, in_body, kept = connections
        kept.send(message)
        assert kept.reply().status == 200
        in_head.send(message[: head - 5])
        in_body.send(message[:-5])
        call = service.future(late())
        time.sleep(0.1)
        hasty.signal(signal.SIGSTOP)
        fresh.send(message)
        in_head.send(message[head - 5 :])
        in_body.send(message[-5:])
        kept.send(message)
        go.set()
        time.sleep(1)
        hasty.signal(signal.SIGCONT)
        assert [connection.reply().status for connection in connections] == [200] * 4
        assert call.result(60)


def test_idle_and_old_connections_are_closed(hasty: Served) -> None:
    with hasty.connect() as connection:
        start = time.monotonic()  # before the server can have begun to count
        connection.send(GOOD)
        assert_right(connection.reply())
        assert connection.closed()
        assert time.monotonic() - start > 0.4
    with hasty.connect() as connection:
        start = time.monotonic()
        while connection.send(GOOD) or connection.reply().headers.get("connection") != "close":
            assert time.monotonic() - start < 60
            time.sleep(0.2)
        assert connection.closed()


def test_calls_whose_message_does_not_come(hasty: Served) -> None:
    """They would hold every place for good."""
    end = threading.Event()
    with grpc.insecure_channel(hasty.grpc) as channel:
        open_calls = [
            channel.stream_unary(SERVICE + "ModelInfer").future(iter(lambda: end.wait(120) or b"", True))
            for _ in range(CONNECTIONS + 5)
        ]
        assert {call.code() for call in open_calls} <= {LATE, EXHAUSTED}
        assert infer(channel, timeout=60).code() is grpc.StatusCode.OK
        end.set()


def test_a_grpc_connection_that_says_nothing(hasty: Served) -> None:
    with Connection(hasty.grpc_port) as connection:
        connection.socket.recv(1 << 16)  # the server's settings
        while connection.socket.recv(1 << 16):
            pass


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such option")
def test_clients_that_do_not_take_their_answers(hasty: Served) -> None:
    hasty.metrics()  # the first opens a file that stays open
    before = hasty.descriptors()
    with ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", hasty.port))
        silent.settimeout(0.3)
        with suppress(OSError):  # until the buffers on the way are full
            while True:
                silent.sendall(http("GET", "/") * 60)
        assert eventually(lambda: hasty.metrics()["mpdsgr_connections"] == 1)
        assert eventually(lambda: hasty.descriptors() <= before)
    assert_right(hasty.ask(GOOD))
