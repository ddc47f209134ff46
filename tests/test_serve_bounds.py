"""What a server lets a client take: places in the queue and memory. Good requests go on through."""

import json
import re
import subprocess
import sys
import time
from contextlib import ExitStack

import grpc
from bounded import (
    EXHAUSTED,
    GOOD,
    LATE,
    QUEUE,
    QUEUED,
    ROOM,
    SERVICE,
    X,
    assert_right,
    channel,
    dropped,
    infer,
    server,
)
from served import BUNDLE, INFER, LARGE, Connection, Served, eventually, http, large_request, request
from tritonclient.grpc import service_pb2 as pb


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
            assert f"{QUEUE} images are waiting, and {QUEUE} may wait" in refused.json()["error"]
            assert infer(channel).code() is EXHAUSTED
            assert dropped(server, "queue_full") == before + 2
        for connection in waiting:
            assert_right(connection.reply())
        assert call.code() is grpc.StatusCode.OK


def test_memory_in_flight(server: Served, channel: grpc.Channel) -> None:
    with server.hold():
        refused = server.ask(large_request())
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "the requests in memory" in refused.json()["error"]
        message = pb.ModelInferRequest(model_name="bundle", raw_input_contents=[bytes(ROOM // 2)])
        call = channel.unary_unary(SERVICE + "ModelInfer").future(message.SerializeToString())
        assert (call.code(), "the requests in memory" in call.details()) == (EXHAUSTED, True)
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
