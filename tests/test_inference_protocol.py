"""What a client writes in an inference request and reads in a response, in both forms of the tensors."""

import json
from typing import Any

import numpy as np
import pytest
from served import images

from mpdsgr_deploy.runtime.inference_protocol import HEADER, OutputTensor, encode_request, read_output
from mpdsgr_deploy.serving.requests import parse_request
from mpdsgr_deploy.serving.tensors import ImageInput

X = images(2)
INPUT = ImageInput("images", (1, 8, 8), 4)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("x", [X, np.rint(X * 255).astype(np.uint8)], ids=["float32", "uint8"])
def test_the_server_reads_what_the_client_writes(x: np.ndarray, binary: bool) -> None:
    headers, body = encode_request({"images": x}, "logits", binary=binary)
    request = parse_request(body, headers.get(HEADER), INPUT)
    (output,), (tensor,) = request.outputs, request.inputs
    assert (output.name, output.binary) == ("logits", binary)
    np.testing.assert_array_equal(INPUT.images(tensor), x if x.dtype == np.float32 else x / np.float32(255))


def response(outputs: list[dict[str, Any]], rest: bytes = b"") -> tuple[bytes, int]:
    head = json.dumps({"outputs": outputs}).encode()
    return head + rest, len(head)


def named(name: str, **entries: Any) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": [1, 2], **entries}


def test_an_output_is_found_behind_others() -> None:
    other = np.float32([[7, 8, 9]]).tobytes()
    outputs = [named("other", parameters={"binary_data_size": 12}), named("logits", parameters={"binary_data_size": 8})]
    body, size = response(outputs, other + np.float32([[1, 2]]).tobytes())
    output = read_output(body, size, "logits")
    assert (output.floats().tolist(), output.is_whole) == ([[1, 2]], True)
    body, _ = response([named("logits", data=[3, 4e40])])
    assert read_output(body, None, "logits").floats().tolist() == [[3, np.inf]]


WRONG = {
    "no JSON": (b"{", None),
    "no such output": response([named("other", data=[1, 2])]),
    "too short": response([named("logits", parameters={"binary_data_size": 8})], bytes(7)),
    "too long": response([named("logits", parameters={"binary_data_size": 8})], bytes(9)),
    "no numbers": response([named("logits")]),
    "a shape in words": response([named("logits", shape="ab", data=[])]),
    "a list": (b"[]", None),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_response_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read_output(*WRONG[name], "logits")


def test_a_tensor_is_whole_when_it_has_as_many_numbers_as_its_shape_says() -> None:
    assert OutputTensor("FP32", [2], [1, 2]).is_whole
    assert not OutputTensor("FP32", [3], [1, 2]).is_whole
    assert OutputTensor("FP32", [1, 2], [[1, 2]]).is_whole
    assert not OutputTensor("FP32", [2, 1], [[1], [1, 2]]).is_whole
    assert not OutputTensor("FP32", [2], bytes(7)).is_whole
    assert OutputTensor("BYTES", [2], bytes(7)).is_whole
