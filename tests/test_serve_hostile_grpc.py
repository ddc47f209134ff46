"""Calls over gRPC that break the protocol, against a real server: each gets its status, and the server goes on."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import BUNDLE, Served, eventually, images
from tritonclient.grpc import service_pb2 as pb

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.runtime import open_predictor

SERVICE = "/inference.GRPCInferenceService/"
LIMIT = 1 << 20
X = images()
INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with Served(limits={"batch": 8, "in_flight_bytes": LIMIT}) as served:
        yield served
        failed = [line for line in served.lines if line["level"] in ("error", "critical", "")]
        codes = {key for key in served.metrics() if 'protocol="grpc"' in key}
        assert served.alive
        assert not failed
        assert not [key for key in codes if 'code="INTERNAL"' in key or 'code="UNKNOWN"' in key]


@cache
def expected(pixels: bytes, datatype: str = "FP32") -> np.ndarray:
    """What the network gives in this process."""
    with open_predictor(open_bundle(BUNDLE)) as predictor:
        x = np.frombuffer(pixels, "<f4") if datatype == "FP32" else np.frombuffer(pixels, "u1") / np.float32(255)
        return predictor(x.reshape(-1, 1, 8, 8).astype("f4"))


@pytest.fixture(scope="module")
def channel(server: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


def infer(**fields: Any) -> pb.ModelInferRequest:
    """A valid request, raw."""
    request = pb.ModelInferRequest(**{"model_name": "bundle", **fields})
    request.inputs.add(name="images", datatype="FP32", shape=X.shape)
    request.raw_input_contents.append(X.tobytes())
    return request


def typed(field: str = "fp32_contents", datatype: str = "FP32", numbers: Any = None) -> pb.ModelInferRequest:
    """A request with its numbers in a field of `contents`."""
    request = pb.ModelInferRequest(model_name="bundle")
    tensor = request.inputs.add(name="images", datatype=datatype, shape=X.shape)
    getattr(tensor.contents, field).extend(X.ravel().tolist() if numbers is None else numbers)
    return request


def call(channel: grpc.Channel, method: str, message: Any, seconds: float = 10, **options: Any) -> bytes:
    content = message if isinstance(message, bytes) else message.SerializeToString()
    return channel.unary_unary(SERVICE + method)(content, timeout=seconds, **options)


def refused(channel: grpc.Channel, method: str, message: Any, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, message, **options)
    return caught.value


def logits(answer: bytes) -> np.ndarray:
    response = pb.ModelInferResponse.FromString(answer)
    return np.frombuffer(response.raw_output_contents[0], "<f4").reshape(response.outputs[0].shape)


def assert_serves(channel: grpc.Channel) -> None:
    np.testing.assert_allclose(logits(call(channel, "ModelInfer", infer())), expected(X.tobytes()), atol=1e-5)


def changed(change: Callable[[Any], object], base: Callable[[], Any] = infer) -> Any:
    """A valid request after `change`."""
    request = base()
    change(request)
    return request


def shaped(*shape: int) -> Any:
    def change(request: Any) -> None:
        del request.inputs[0].shape[:]
        request.inputs[0].shape.extend(shape)

    return changed(change)


def raw(content: bytes, datatype: str = "FP32") -> Any:
    def change(request: Any) -> None:
        request.inputs[0].datatype, request.raw_input_contents[0] = datatype, content

    return changed(change)


def pixel(value: float) -> Any:
    x = X.copy()
    x[0, 0, 3, 3] = value
    return raw(x.tobytes())


def asked(name: str = "logits", **parameters: Any) -> Any:
    """Of an output with parameters, each (kind, value)."""
    request = infer()
    output = request.outputs.add(name=name)
    for key, (kind, value) in parameters.items():
        setattr(output.parameters[key], kind, value)
    return request


def parameter(kind: str, value: Any) -> Any:
    return changed(lambda r: setattr(r.parameters["timeout"], kind, value))


REFUSED = {
    "no protobuf": (b"\xff\xff\xff garbage", "not a ModelInferRequest"),
    "cut off": (infer().SerializeToString()[:-5], "not a ModelInferRequest"),
    "name is no UTF-8": (b"\x0a\x02\xff\xfe", "not a ModelInferRequest"),
    "no input": (changed(lambda r: r.ClearField("inputs"), typed), "this one has 0"),
    "raw without inputs": (changed(lambda r: r.ClearField("inputs")), "0 inputs and 1 raw"),
    "two inputs, one raw": (changed(lambda r: r.inputs.append(r.inputs[0])), "2 inputs and 1 raw"),
    "one input, two raw": (changed(lambda r: r.raw_input_contents.append(b"")), "1 inputs and 2 raw"),
    "the input twice": (
        changed(lambda r: (r.inputs.append(r.inputs[0]), r.raw_input_contents.append(r.raw_input_contents[0]))),
        "this one has 2",
    ),
    "unknown input": (changed(lambda r: setattr(r.inputs[0], "name", "image")), "there is no input 'image'"),
    "nameless input": (changed(lambda r: setattr(r.inputs[0], "name", "")), "there is no input ''"),
    "FP64": (raw(X.astype("f8").tobytes(), "FP64"), "not 'FP64'"),
    "no datatype": (raw(X.tobytes(), ""), "not ''"),
    "BYTES": (raw(b"", "BYTES"), "not 'BYTES'"),
    "no shape": (shaped(), "must have shape [B, 1, 8, 8], not []"),
    "rank 3": (shaped(1, 8, 8), "not [1, 8, 8]"),
    "rank 5": (shaped(1, 1, 1, 8, 8), "not [1, 1, 1, 8, 8]"),
    "no image": (shaped(0, 1, 8, 8), "not [0, 1, 8, 8]"),
    "another size": (shaped(1, 1, 4, 16), "not [1, 1, 4, 16]"),
    "negative": (shaped(-1, 1, 8, 8), "not [-1, 1, 8, 8]"),
    "two negatives": (shaped(-1, -1, 8, 8), "not [-1, -1, 8, 8]"),
    "10^12 images": (shaped(10**12, 1, 8, 8), "may hold at most 8 images"),
    "2^63 - 1 images": (shaped(2**63 - 1, 1, 8, 8), "may hold at most 8 images"),
    "2^62 channels": (shaped(4, 2**62, 8, 8), "must have shape"),
    "over the limit": (shaped(9, 1, 8, 8), "may hold at most 8 images, and this one holds 9"),
    "more than the data": (shaped(2, 1, 8, 8), "takes 512 bytes, got 256"),
    "a byte less": (raw(X.tobytes()[:-1]), "takes 256 bytes, got 255"),
    "a byte more": (raw(X.tobytes() + b"\0"), "takes 256 bytes, got 257"),
    "empty raw": (raw(b""), "takes 256 bytes, got 0"),
    "UINT8 of float's size": (raw(X.tobytes(), "UINT8"), "takes 64 bytes, got 256"),
    "NaN": (pixel(np.nan), "finite"),
    "infinite": (pixel(np.inf), "finite"),
    "minus infinite": (pixel(-np.inf), "finite"),
    "above 1": (pixel(1.001), "in [0, 1]"),
    "below 0": (pixel(-0.001), "in [0, 1]"),
    "raw and typed": (
        changed(lambda r: r.inputs[0].contents.fp32_contents.append(1.0)),
        "has data in both",
    ),
    "no data": (changed(lambda r: r.inputs[0].ClearField("contents"), typed), "takes 64 numbers, got 0"),
    "typed NaN": (typed(numbers=[float("nan")] * 64), "finite"),
    "typed too few": (typed(numbers=[0.5] * 63), "takes 64 numbers, got 63"),
    "typed too many": (typed(numbers=[0.5] * 65), "takes 64 numbers, got 65"),
    "fp64_contents": (typed("fp64_contents"), "belong in fp32_contents, not in fp64_contents"),
    "int_contents": (typed("int_contents", numbers=[1] * 64), "not in int_contents"),
    "bool_contents": (typed("bool_contents", numbers=[True] * 64), "not in bool_contents"),
    "bytes_contents": (typed("bytes_contents", numbers=[b"1"] * 64), "not in bytes_contents"),
    "UINT8 in fp32_contents": (typed("fp32_contents", "UINT8"), "belong in uint_contents"),
    "UINT8 256": (typed("uint_contents", "UINT8", [256] * 64), "outside the range of UINT8"),
    "UINT8 2^32 - 1": (typed("uint_contents", "UINT8", [2**32 - 1] * 64), "outside the range of UINT8"),
    "two kinds of contents": (
        changed(lambda r: r.inputs[0].contents.int_contents.append(1), typed),
        "belong in fp32_contents, not in",
    ),
    "unknown output": (asked("probabilities"), "there is no output 'probabilities'"),
    "an output twice": (changed(lambda r: r.outputs.add(name="logits"), asked), "requested twice"),
    "classes of the margin": (
        asked("margin", classification=("int64_param", 3)),
        "classification is only available for the output 'logits'",
    ),
    "-1 classes": (asked(classification=("int64_param", -1)), "classification must be"),
    "2^62 classes": (asked(classification=("int64_param", 2**62)), "classification must be"),
    "classes in words": (asked(classification=("string_param", "3")), "classification must be"),
    "classes of no words": (asked(classification=("string_param", "")), "classification must be"),
    "classes: false": (asked(classification=("bool_param", False)), "classification must be"),
    "output in shared memory": (asked(shared_memory_region=("string_param", "x")), "shared memory"),
    "input in shared memory": (
        changed(lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "x")),
        "shared memory",
    ),
    "timeout in words": (parameter("string_param", "5"), "timeout must be"),
    "timeout false": (parameter("bool_param", False), "timeout must be"),
    "timeout 0.0": (parameter("double_param", 0.0), "timeout must be"),
    "timeout negative": (parameter("int64_param", -1), "timeout must be"),
    "id too long": (infer(id="x" * 257), "id must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused(channel: grpc.Channel, name: str) -> None:
    message, part = REFUSED[name]
    error = refused(channel, "ModelInfer", message)
    assert (error.code(), part in error.details()) == (INVALID, True), error.details()
    assert_serves(channel)


@pytest.mark.parametrize("name", ["", "nope", "../bundle", "bundle\0", "bundle/versions/1", "x" * 10_000, "\u202e"])
def test_models_that_are_not_there(channel: grpc.Channel, name: str) -> None:
    error = refused(channel, "ModelInfer", infer(model_name=name))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert len(error.details()) < 1000
    request = pb.ModelMetadataRequest(name=name)
    assert refused(channel, "ModelMetadata", request).code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["0", "2", "01", "-1", "latest", "1\n", "9" * 5000])
def test_versions_that_are_not_there(channel: grpc.Channel, version: str) -> None:
    assert refused(channel, "ModelInfer", infer(model_version=version)).code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata", "ModelConfig", "RepositoryIndex"])
def test_bytes_that_are_no_message(channel: grpc.Channel, method: str) -> None:
    error = refused(channel, method, b"\x07\xff\xff")
    assert (error.code(), error.details()) == (INVALID, f"the message is not a {method}Request")


@pytest.mark.parametrize("method", ["ModelStreamInfer", "SystemSharedMemoryRegister", "TraceSetting", "Nope", ""])
def test_methods_that_are_not_there(channel: grpc.Channel, method: str) -> None:
    assert refused(channel, method, b"").code() is UNIMPLEMENTED


def test_models_are_not_loaded_by_request(channel: grpc.Channel) -> None:
    for method, message in (
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="bundle")),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="bundle")),
    ):
        assert refused(channel, method, message).code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_message_or_metadata_too_large(channel: grpc.Channel) -> None:
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused(channel, "ModelInfer", bytes(LIMIT + 1)).code() is exhausted
    assert refused(channel, "ModelInfer", infer(), metadata=[("x", "a" * 100_000)]).code() is exhausted
    assert_serves(channel)


def test_calls_that_are_given_up(server: Served, channel: grpc.Channel) -> None:
    for _ in range(50):
        channel.unary_unary(SERVICE + "ModelInfer").future(infer().SerializeToString()).cancel()
    assert_serves(channel)
    assert eventually(lambda: server.metrics()["mpdsgr_in_flight_bytes"] == 0)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.tuples(st.integers(0, 400), st.integers(1, 255)),
    )
)
def test_any_bytes_and_any_flipped_byte(channel: grpc.Channel, case: bytes | tuple[int, int]) -> None:
    content = bytearray(infer(id="a").SerializeToString() if isinstance(case, tuple) else case)
    if isinstance(case, tuple):
        content[case[0] % len(content)] ^= case[1]
    answered = channel.unary_unary(SERVICE + "ModelInfer").future(bytes(content), timeout=30)
    assert answered.code() in (grpc.StatusCode.OK, INVALID, grpc.StatusCode.NOT_FOUND)
    if answered.code() is grpc.StatusCode.OK:
        told = pb.ModelInferRequest.FromString(bytes(content))
        right = expected(told.raw_input_contents[0], told.inputs[0].datatype)
        np.testing.assert_allclose(logits(answered.result()), right, atol=1e-5)
