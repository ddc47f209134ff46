"""What a server lets a client take: places in the queue, connections, memory, time. Good requests go on through."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import cache

import grpc
import numpy as np
import pytest
from served import BUNDLE, INFER, LARGE, Connection, Reply, Served, eventually, http, images, large_request, request
from served_clients import asked
from tritonclient.grpc import service_pb2 as pb

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.serving.listener import RESERVE

SERVICE = "/inference.GRPCInferenceService/"
QUEUE, CONNECTIONS = 16, 40
ROOM = int(len(large_request()) * 1.5)  # bytes in flight: for one of them
X = images()
GOOD = http("POST", INFER, request(X))
QUEUED = 'mpdsgr_queued_images{model="bundle"}'
HASTY = {
    "header_seconds": 0.6,
    "body_seconds": 0.8,
    "request_seconds": 0.2,
    "keep_alive_seconds": 0.5,
    "connection_age_seconds": 1,
}
EXHAUSTED, LATE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = {"batch": LARGE, "queue": QUEUE, "connections": CONNECTIONS, "in_flight_bytes": ROOM}
    with Served(limits=limits, gate=tmp_path_factory.mktemp("held") / "gate") as served:
        yield served
        assert served.alive
        assert not [line for line in served.lines if line["level"] in ("error", "critical", "")]
        assert served.metrics()["mpdsgr_in_flight_bytes"] == served.metrics()[QUEUED] == 0


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With little time for anything."""
    limits = {"batch": LARGE, "connections": CONNECTIONS, **HASTY}
    with Served(limits=limits, gate=tmp_path_factory.mktemp("hasty") / "gate") as served:
        yield served
        assert served.alive
        assert not [line for line in served.lines if line["level"] in ("error", "critical", "")]


@pytest.fixture(scope="module")
def channel(server: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


@cache
def right() -> np.ndarray:
    """What the network gives in this process."""
    with open_predictor(open_bundle(BUNDLE)) as predictor:
        return predictor(X)


def assert_right(reply: Reply) -> None:
    assert reply.status == 200, reply.body
    np.testing.assert_allclose(reply.output(), right(), atol=1e-5)


def infer(channel: grpc.Channel, **options: object) -> grpc.Future:
    """A call over gRPC with the one image, under way."""
    message = pb.ModelInferRequest(model_name="bundle")
    message.inputs.add(name="images", datatype="FP32", shape=X.shape)
    message.raw_input_contents.append(X.tobytes())
    return channel.unary_unary(SERVICE + "ModelInfer").future(message.SerializeToString(), **options)


def dropped(server: Served, reason: str) -> float:
    return server.counted("mpdsgr_dropped_total", reason=reason)


def test_a_full_queue(server: Served, channel: grpc.Channel) -> None:
    before = dropped(server, "queue_full")
    with ExitStack() as stack:
        with server.hold():
            waiting = [stack.enter_context(server.connect(60)) for _ in range(QUEUE - 1)]
            for connection in waiting:
                connection.send(GOOD)
            call = infer(channel, timeout=60)
            assert eventually(lambda: server.metrics()[QUEUED] == QUEUE)
            refused = server.ask(GOOD)
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert refused.json() == {"error": f"{QUEUE} images wait, {QUEUE} may; try again soon"}
            assert infer(channel).code() is EXHAUSTED
            assert dropped(server, "queue_full") == before + 2
        for connection in waiting:
            assert_right(connection.reply())
        assert call.code() is grpc.StatusCode.OK


def test_memory_in_flight(server: Served, channel: grpc.Channel) -> None:
    with server.hold():
        refused = server.ask(large_request())
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "too many bytes" in refused.json()["error"]
        message = pb.ModelInferRequest(model_name="bundle", raw_input_contents=[bytes(ROOM // 2)])
        call = channel.unary_unary(SERVICE + "ModelInfer").future(message.SerializeToString())
        assert (call.code(), "too many bytes" in call.details()) == (EXHAUSTED, True)
    assert server.ask(http("POST", INFER, bytes(ROOM * 2))).status == 413
    assert_right(server.ask(GOOD))


def test_a_timeout_that_the_client_gives(server: Served, channel: grpc.Channel) -> None:
    before = dropped(server, "deadline"), dropped(server, "cancelled")
    with server.hold():
        start = time.monotonic()
        refused = server.post(INFER, {**request(X), "parameters": {"timeout": 100_000}})
        assert (refused.status, "timeout passed" in refused.json()["error"]) == (504, True)
        assert time.monotonic() - start >= 0.1
        assert infer(channel, timeout=0.1).code() is LATE
    assert_right(server.ask(GOOD))
    assert eventually(lambda: dropped(server, "deadline") == before[0] + 1)
    assert eventually(lambda: dropped(server, "cancelled") == before[1] + 1)


def test_clients_that_leave_while_they_wait(server: Served) -> None:
    before, computed = dropped(server, "cancelled"), server.counted("mpdsgr_images_total")
    with server.hold():
        for n in range(5):
            with server.connect() as connection:
                connection.send(GOOD * (1 + n % 2))  # a second one behind the first changes nothing
                assert eventually(lambda n=n: server.metrics()[QUEUED] == n + 1)
    assert_right(server.ask(GOOD))
    assert eventually(lambda: dropped(server, "cancelled") == before + 5)
    assert server.counted("mpdsgr_images_total") == computed + LARGE + 1  # nothing for those who left
    assert server.counted("mpdsgr_requests_total", code="499") >= 5


def assert_nobody_else(server: Served) -> None:
    """Wait until the server has seen everybody leave; before, it may have no place for who asks."""
    assert eventually(lambda: server.get("/v2").status == 200)
    assert eventually(lambda: server.metrics()["mpdsgr_connections"] == 1)


def assert_too_many(reply: Reply) -> None:
    assert (reply.status, reply.headers.get("retry-after")) == (503, "1"), reply
    assert "too many connections" in reply.json()["error"]


def test_connections(server: Served) -> None:
    assert_nobody_else(server)
    with ExitStack() as stack:
        kept = [stack.enter_context(server.connect()) for _ in range(CONNECTIONS)]
        kept[0].send(http("GET", "/v2/health/live"))
        assert kept[0].reply().status == 200
        for refused in [stack.enter_context(server.connect()) for _ in range(5)]:
            assert_too_many(refused.reply())
            assert refused.closed()
        kept[-1].send(GOOD)
        assert_right(kept[-1].reply())
    assert_nobody_else(server)
    assert_right(server.ask(GOOD))


REFUSED = {  # by status
    400: b"no request\r\n\r\n",
    404: http("GET", "/nothing"),
    405: http("DELETE", INFER),
    413: http("POST", "/v2/repository/index", bytes(1 << 17)),
    415: http("POST", INFER, b"{}", {"Content-Encoding": "br"}),
    431: http("GET", "/v2", headers={"X": "x" * (1 << 17)}),
}


def test_refusals_have_the_same_headers_whoever_writes_them(server: Served) -> None:
    """Some are written before there is a request to answer."""
    with ExitStack() as stack:
        replies = {status: server.ask(request) for status, request in REFUSED.items()}
        for _ in range(CONNECTIONS):
            stack.enter_context(server.connect())
        replies[503] = server.ask(GOOD)
    assert {status: reply.status for status, reply in replies.items()} == {status: status for status in replies}
    for status, reply in replies.items():
        assert reply.headers["content-type"] == "application/json"
        assert (reply.headers["x-content-type-options"], list(reply.json())) == ("nosniff", ["error"])
        assert reply.headers["x-request-id"]
        assert reply.headers.get("allow") == ("POST" if status == 405 else None)
        assert reply.headers.get("retry-after") == ("1" if status == 503 else None)


def test_a_burst_of_connections_takes_the_places_that_are_free(server: Served) -> None:
    """Accepted all at once after a pause: each is judged by those before it, and who left in between is none."""
    assert_nobody_else(server)
    with ExitStack() as stack:
        server.signal(signal.SIGSTOP)
        try:
            server.connect().close()
            burst = [stack.enter_context(server.connect(5)) for _ in range(CONNECTIONS + 5)]
        finally:
            server.signal(signal.SIGCONT)
        for refused in burst[CONNECTIONS:]:
            assert_too_many(refused.reply())
        for connection in burst[:CONNECTIONS]:
            connection.send(GOOD)
            assert_right(connection.reply())
    assert_nobody_else(server)


def test_the_answer_to_a_connection_above_the_reserve_is_not_reset(server: Served) -> None:
    """Its request is there already: left unread, it would reset the connection and take the answer along."""
    assert_nobody_else(server)
    with ExitStack() as stack:
        server.signal(signal.SIGSTOP)
        try:
            for _ in range(CONNECTIONS + RESERVE):
                stack.enter_context(server.connect(5))
            refused = [stack.enter_context(server.connect(5)) for _ in range(3)]
            for connection in refused:
                connection.send(GOOD)
        finally:
            server.signal(signal.SIGCONT)
        for connection in refused:
            assert_too_many(connection.reply())
            assert connection.socket.recv(1) == b""
    assert_nobody_else(server)


def test_probes_of_health_have_a_way_in_of_their_own(server: Served) -> None:
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(server.connect()).send(GOOD[:-5])
        assert eventually(lambda: server.ask(GOOD).status == 503)
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert server.get(path).status == 200
    assert eventually(lambda: server.ask(GOOD).status == 200)


def test_a_body_above_the_limit_gets_its_answer_while_it_is_still_sent(server: Served) -> None:
    whole = http("POST", INFER, bytes(1 << 25))
    for _ in range(3):
        with server.connect() as connection:
            connection.socket.sendall(whole)  # raises if the server closes after LINGER seconds, for want of reading
            assert connection.reply().status == 413


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    command = [sys.executable, "-m", "mpdsgr_deploy", "serve", BUNDLE, "--port", "0", "--grpc-port", "0"]
    command += ["--set", "log.requests=true", "--set", "limits.grace_seconds=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, b"")
    port = next(int(found[1]) for line in lines if (found := re.search(rb"serving on \S+:(\d+)", line)))
    for number in range(3):  # 65,536 bytes are a full pipe
        with Connection(port) as connection:
            connection.send(http("GET", f"/v2/{'x' * 5000}") * 60)
            for _ in range(60):
                assert connection.reply().status == 404
            connection.send(http("GET", "/v2") * 60)
            for _ in range(60):
                assert connection.reply().status == 200, number
    process.terminate()
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    told = [json.loads(line) for line in rest.splitlines()]
    assert all(len(line["path"]) <= 200 and line["peer"].startswith("127.0.0.1:") for line in told if "path" in line)


def test_lists_that_would_fill_the_memory(server: Served) -> None:
    """A list takes sixty bytes once it is parsed, and two or three in JSON."""
    before = server.rss()
    for part in (b"[],", b"{},"):
        reply = server.ask(http("POST", INFER, b"[" + part * (ROOM * 2 // 3 // len(part)) + b"1]"))
        assert (reply.status, "more values than" in reply.json()["error"]) == (400, True)
    assert server.rss() < before + ROOM * 6
    assert_right(server.ask(GOOD))


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
        assert hasty.descriptors() <= before + 1  # the connection that asks
    assert_right(hasty.ask(GOOD))
