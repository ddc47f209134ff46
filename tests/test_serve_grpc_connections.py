"""What gRPC lets a client take in connections, streams and files. Good calls go through meanwhile."""

import resource
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import grpc
from grpc_bounded import CONNECTIONS, EXHAUSTED, LARGEST, asked, assert_serves, server, valid
from served import Served, eventually

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from http2 import SERVICE, Http2


def test_streams_without_a_message_hold_up_nobody(server: Served) -> None:
    with Http2(server.grpc_port) as client:
        for _ in range(1000):
            client.open("ModelInfer")
        client.read(0.2)
        assert_serves(server)


def test_a_burst_of_valid_calls_is_answered_whole(server: Served) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary(SERVICE + "ModelInfer")
        calls = [infer.future(valid(), timeout=120) for _ in range(3000)]
        assert Counter(call.code() for call in calls) == {grpc.StatusCode.OK: 3000}


def test_rapid_resets_take_nothing_from_others(server: Served) -> None:
    stop = threading.Event()

    def attack() -> None:
        client = Http2(server.grpc_port)
        while not stop.is_set():
            for _ in range(50):
                client.reset(client.open("ModelInfer"))
            client.read(0.0005)
        client.close()

    memory = server.rss()
    attackers = [threading.Thread(target=attack) for _ in range(2)]
    for attacker in attackers:
        attacker.start()
    try:
        assert Counter(asked(server, seconds=60).code() for _ in range(8)) == {grpc.StatusCode.OK: 8}
    finally:
        stop.set()
        for attacker in attackers:
            attacker.join()
    assert server.rss() - memory < 100e6


def test_idle_connections_are_bounded_and_closed() -> None:
    with Served(limits={"connections": CONNECTIONS, "keep_alive_seconds": 1}) as served, ExitStack() as opened:
        before = served.descriptors()
        clients = [opened.enter_context(Http2(served.grpc_port)) for _ in range(3 * CONNECTIONS)]
        assert served.get("/v2/health/live").status == 200
        greatest, last, stop = 0, 0, time.monotonic() + 60
        while not all(client.gone for client in clients):  # those over the limit at once, the others as they are idle
            assert time.monotonic() < stop
            held = served.descriptors() - before
            greatest, last = max(greatest, min(held, last)), held
            for client in clients:
                client.read(0.001)
        # of two looks: gRPC accepts a connection over the limit before it closes it, so that one look may count it
        assert 0 < greatest <= CONNECTIONS + 2
        assert eventually(lambda: served.descriptors() - before <= 3)
        assert_serves(served)


def test_a_client_moves_on_when_its_connection_is_old() -> None:
    with Served(limits={"connection_age_seconds": 1}) as served, Http2(served.grpc_port) as client:
        stop = time.monotonic() + 60
        while not client.gone and time.monotonic() < stop:
            client.read(0.2)
        assert client.gone


def test_the_limit_of_open_files_is_raised_or_told() -> None:
    def open_files(served: Served) -> tuple[int, int]:
        return resource.prlimit(served.pid, resource.RLIMIT_NOFILE)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with Served() as served:
            assert open_files(served)[0] == 2200
        most = 2**20 if hard == resource.RLIM_INFINITY else hard
        with Served(limits={"connections": most}) as served:
            told = any("lower limits.connections" in line["message"] for line in served.lines)
            assert told == (most == hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_refusal_and_every_connection_is_counted(server: Served) -> None:
    """Those too that gRPC's core makes before there is a call to answer."""

    def count(code: str) -> float:
        return server.counted("mpdsgr_requests_total", protocol="grpc", code=code)

    before = count("RESOURCE_EXHAUSTED"), count("UNIMPLEMENTED")
    assert asked(server, bytes(LARGEST + 100)).code() is EXHAUSTED
    assert asked(server, method=SERVICE + "Nothing").code() is grpc.StatusCode.UNIMPLEMENTED
    assert eventually(lambda: (count("RESOURCE_EXHAUSTED"), count("UNIMPLEMENTED")) == (before[0] + 1, before[1] + 1))
    assert eventually(lambda: server.metrics()["mpdsgr_grpc_connections"] == 0)
    with Http2(server.grpc_port):
        assert eventually(lambda: server.metrics()["mpdsgr_grpc_connections"] == 1)
