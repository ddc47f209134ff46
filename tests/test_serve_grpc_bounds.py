"""What gRPC lets a client take by messages: CPU and memory. Good calls go through meanwhile."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_bounded import EXHAUSTED, INVALID, LARGEST, asked, assert_serves, server
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from served import BUNDLE, Served, images
from tritonclient.grpc import service_pb2 as pb

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from http2 import Http2, message

HEALTH = "/grpc.health.v1.Health/"
HEAD = 5  # bytes before a message in its stream: the server asks for them beside its window


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
