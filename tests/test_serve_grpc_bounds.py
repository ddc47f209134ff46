"""What gRPC lets a client take: CPU, memory, connections, streams. Good calls go through meanwhile."""

import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from served import BUNDLE, Served, eventually, images
from tritonclient.grpc import service_pb2 as pb

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from http2 import SERVICE, Http2, message

EXHAUSTED, INVALID = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT
X = images()
HEALTH = "/grpc.health.v1.Health/"
CONNECTIONS = 30
LARGEST = (1 << 16) + 8 * 64 * 4  # of a message: the envelope, and eight images in float32
HEAD = 5  # bytes before a message in its stream: the server asks for them beside its window


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = {"batch": 8, "connections": CONNECTIONS, "in_flight_bytes": 5 * LARGEST, "body_seconds": 20}
    with Served(limits=limits) as served:
        yield served
        assert served.alive
        assert not [line for line in served.lines if line["level"] in ("error", "critical", "")]


def valid() -> bytes:
    request = pb.ModelInferRequest(model_name="bundle")
    request.inputs.add(name="images", datatype="FP32", shape=X.shape)
    request.raw_input_contents.append(X.tobytes())
    return request.SerializeToString()


def asked(
    server: Served, content: bytes | None = None, seconds: float = 20, method: str = SERVICE + "ModelInfer"
) -> Any:
    """A call on a connection of its own, which came to an end."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc, options=options) as channel:
        call = channel.unary_unary(method).future(valid() if content is None else content, timeout=seconds)
        call.exception()
        return call


def assert_serves(server: Served) -> None:
    call = asked(server)
    assert call.code() is grpc.StatusCode.OK, call.details()
    assert np.isfinite(
        np.frombuffer(pb.ModelInferResponse.FromString(call.result()).raw_output_contents[0], "f4")
    ).all()


def cpu(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


ENTRIES = {
    "inputs": b"\x2a\x00",
    "outputs": b"\x32\x00",
    "raw contents": b"\x3a\x00",
    "parameters": b"\x22\x00",
    "unknown fields": b"\xf8\x07\x01",
    "groups": b"\xfb\x07\xfc\x07",
    "names": b"\x0a\x01x",
}
INSIDE = {
    "dimensions of an input": (5, b"\x18\x01"),
    "packed dimensions": (5, b"\x1a\x90\xa1\x0f" + b"\x01" * 250_000),
    "parameters of an input": (5, b"\x22\x00"),
    "unknown fields of an input": (5, b"\xf8\x07\x01"),
    "parameters of an output": (6, b"\x1a\x00"),
    "byte strings of an input": (5, b"\x2a\x82\x80\x0f" + b"\x42\x00" * 122_881),
    "numbers one by one": (5, b"\x2a\x82\x80\x0f" + b"\x35\x00\x00\x00\x00" * 49_152 + b"\x42\x00"),
}


def many(entry: bytes, size: int = LARGEST - 100) -> bytes:
    return b"\x0a\x06bundle" + entry * (size // len(entry))


def inside(field: int, entry: bytes) -> bytes:
    content = entry if len(entry) > 100 else entry * (250_000 // len(entry))
    length = len(content)
    varint = bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14])
    return b"\x0a\x06bundle" + bytes([field << 3 | 2]) + varint + content


@pytest.fixture(scope="module")
def roomy() -> Iterator[Served]:
    """One whose largest message is 590 kB, so that work for each entry would show."""
    with Served(limits={"batch": 2048}) as served:
        yield served


@pytest.mark.parametrize("name", [*ENTRIES, *INSIDE])
def test_entries_are_counted_before_anything_is_made_of_them(roomy: Served, name: str) -> None:
    content = many(ENTRIES[name], 500_000) if name in ENTRIES else inside(*INSIDE[name])
    assert_serves(roomy)
    before, memory = cpu(roomy.pid), roomy.rss()
    call = asked(roomy, content)
    assert (call.code(), cpu(roomy.pid) - before < 0.1) == (INVALID, True), (call.details(), cpu(roomy.pid) - before)
    assert roomy.rss() - memory < 16e6
    assert_serves(roomy)


@pytest.mark.parametrize(("name", "window"), [("server", 65_535), ("roomy", 2**28 // 1000)])
def test_of_a_message_larger_than_any_valid_one_a_window_is_taken(
    request: pytest.FixtureRequest, name: str, window: int
) -> None:
    """Of `in_flight_bytes` for each connection, however fast the network, and never a second one."""
    with Http2(request.getfixturevalue(name).grpc_port) as client:
        for _ in range(3):
            stream = client.open("ModelInfer")
            sent = client.send(stream, message(bytes(20_000_000)))
            while stream not in client.answered and client.read(5.0):
                pass
            assert stream in client.answered
            assert sent <= window + HEAD


def test_a_message_larger_than_any_valid_one_is_refused(server: Served) -> None:
    memory = server.rss()
    call = asked(server, bytes(50_000_000))
    assert call.code() is EXHAUSTED
    assert server.rss() - memory < 16e6
    assert_serves(server)


def test_calls_that_need_no_key_read_no_message(server: Served) -> None:
    with Http2(server.grpc_port) as client:
        stream = client.open("ServerLive")
        sent = client.send(stream, message(bytes(LARGEST))[:-1], end=False, patience=0.5)
        while stream not in client.answered and client.read(5.0):
            pass
        assert stream in client.answered, f"{sent} bytes were taken"


def test_the_health_service_takes_small_messages_only(server: Served) -> None:
    call = asked(server, b"\x0a\x90\x4e" + b"x" * 10_000, method=HEALTH + "Check")
    assert call.code() is EXHAUSTED


def test_messages_on_their_way_fit_the_memory_and_slow_ones_give_way(server: Served) -> None:
    """Five messages fit. Twenty that stop short of their last byte hold up nobody for long."""
    memory = server.rss()
    clients = [Http2(server.grpc_port) for _ in range(20)]
    try:
        for client in clients:
            client.send(client.open("ModelInfer"), message(bytes(LARGEST - 10))[:-1], end=False, patience=0.1)
        assert server.rss() - memory < 40e6
        assert_serves(server)
        assert server.counted("mpdsgr_requests_total", protocol="grpc", code="DEADLINE_EXCEEDED") > 0
    finally:
        for client in clients:
            client.close()
    assert_serves(server)


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
        greatest, stop = 0, time.monotonic() + 60
        while not all(client.gone for client in clients):  # those over the limit at once, the others as they are idle
            assert time.monotonic() < stop
            greatest = max(greatest, served.descriptors() - before)
            for client in clients:
                client.read(0.001)
        assert 0 < greatest <= CONNECTIONS + 2
        assert eventually(lambda: served.descriptors() - before <= 3)
        assert_serves(served)


def test_a_client_moves_on_when_its_connection_is_old() -> None:
    with Served(limits={"connection_age_seconds": 1}) as served, Http2(served.grpc_port) as client:
        stop = time.monotonic() + 60
        while not client.gone and time.monotonic() < stop:
            client.read(0.2)
        assert client.gone


class TestHealth:
    def status(self, server: Served, service: str) -> Any:
        call = asked(
            server, health_pb2.HealthCheckRequest(service=service).SerializeToString(), method=HEALTH + "Check"
        )
        if call.exception():
            return call.code()
        return health_pb2.HealthCheckResponse.FromString(call.result()).status

    def test_check(self, server: Served) -> None:
        for service in ("", "inference.GRPCInferenceService", "bundle"):
            assert self.status(server, service) == health_pb2.HealthCheckResponse.SERVING
        assert self.status(server, "nobody") is grpc.StatusCode.NOT_FOUND

    def test_watch_tells_of_a_stop(self) -> None:
        with Served(limits={"grace_seconds": 1}) as served, grpc.insecure_channel(served.grpc) as channel:
            watched = channel.unary_stream(
                HEALTH + "Watch", response_deserializer=health_pb2.HealthCheckResponse.FromString
            )(b"")
            assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
            served.stop()
            assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING

    @pytest.mark.parametrize("version", ["v1", "v1alpha"])
    def test_reflection_describes_the_service(self, server: Served, version: str) -> None:
        with grpc.insecure_channel(server.grpc) as channel:
            ask = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            (answer,) = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            names = {service.name for service in answer.list_services_response.service}
            assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names


def test_models_of_several_sizes_share_the_largest_limit(tmp_path: Path) -> None:
    with Served(BUNDLE, f"other={BUNDLE}", limits={"batch": 64}) as served:
        assert asked(served, bytes((1 << 16) + 64 * 64 * 4 + 1)).code() is EXHAUSTED
        x = images(64)
        request = pb.ModelInferRequest(model_name="other")
        tensor = request.inputs.add(name="images", datatype="FP32", shape=x.shape)
        tensor.contents.fp32_contents.extend(x.ravel().tolist())
        assert asked(served, request.SerializeToString()).code() is grpc.StatusCode.OK


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
