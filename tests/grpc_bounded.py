"""What tests of the bounds of gRPC share: a server with small limits, and calls to it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from served import Served, images
from tritonclient.grpc import service_pb2 as pb

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from http2 import SERVICE

EXHAUSTED, INVALID = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT
X = images()
CONNECTIONS = 30
LARGEST = (1 << 16) + 8 * 64 * 4  # of a message: the envelope, and eight images in float32


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
    server: Served, content: bytes | None = None, seconds: float = 60, method: str = SERVICE + "ModelInfer"
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
