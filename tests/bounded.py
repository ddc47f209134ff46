"""What tests of the bounds of a server share: servers with small limits, and good requests."""

from collections.abc import Iterator
from functools import cache

import grpc
import numpy as np
import pytest
from served import BUNDLE, INFER, LARGE, Reply, Served, http, images, large_request, request
from tritonclient.grpc import service_pb2 as pb

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.runtime import open_predictor

SERVICE = "/inference.GRPCInferenceService/"
QUEUE, CONNECTIONS = 16, 40
ROOM = int(len(large_request()) * 1.5)  # bytes in flight: for one of them
X = images()
GOOD = http("POST", INFER, request(X))
QUEUED = 'mpdsgr_queued_images{model="bundle"}'
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
