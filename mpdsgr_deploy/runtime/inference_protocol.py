"""Write requests and read responses of the Open Inference Protocol (v2) over HTTP, as a client.

Tensors are in the JSON or, with the extension `binary_tensor_data`, follow it in the order in which it names them. See
https://github.com/kserve/open-inference-protocol.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import one_line

BINARY = "binary_tensor_data"  # name of the protocol's extension
HEADER = "Inference-Header-Content-Length"  # the header with the bytes of JSON in a body, if binary tensors follow
DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
MALFORMED = (KeyError, TypeError, AttributeError, ValueError, RecursionError)  # errors that malformed JSON can cause


class EncodedRequest(NamedTuple):
    """The body of an inference request, and the headers that describe it."""

    headers: dict[str, str]
    body: bytes


def encode_request(tensors: Mapping[str, NDArray[Any]], output: str, *, binary: bool) -> EncodedRequest:
    """Encode a request for the output named `output` of these inputs, which are uint8 or float [B, ...].

    binary: send tensors, and ask for the output, as bytes after the JSON.
    """
    inputs: list[dict[str, Any]] = []
    data: list[bytes] = []
    for name, tensor in tensors.items():
        datatype = "UINT8" if tensor.dtype == np.uint8 else "FP32"
        entry: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "datatype": datatype}
        if binary:
            data.append(np.ascontiguousarray(tensor, DTYPES[datatype]).tobytes())
            entry["parameters"] = {"binary_data_size": len(data[-1])}
        else:
            entry["data"] = tensor.ravel().tolist()
        inputs.append(entry)
    answer = {"name": output, "parameters": {"binary_data": True}} if binary else {"name": output}
    head = json.dumps({"inputs": inputs, "outputs": [answer]}).encode()
    if not binary:
        return EncodedRequest({"Content-Type": "application/json"}, head)
    headers = {"Content-Type": "application/octet-stream", HEADER: str(len(head))}
    return EncodedRequest(headers, b"".join([head, *data]))


class OutputTensor(NamedTuple):
    """An output as a response describes it. content: its bytes, or the list of a JSON response, flat or nested."""

    datatype: str
    shape: list[int]
    content: bytes | list[Any]

    @property
    def is_whole(self) -> bool:
        """Whether the content has as many numbers as the shape says; True for bytes of an unknown datatype."""
        count = prod(self.shape)
        if isinstance(self.content, list):
            try:
                return np.size(self.content) == count
            except ValueError:  # the lists in it have different lengths
                return False
        return self.datatype not in DTYPES or len(self.content) == count * DTYPES[self.datatype].itemsize

    def floats(self) -> NDArray[np.float32]:
        """Return the numbers, float32 [*shape], in new memory; a number beyond the range of float32 becomes infinite.

        Raises ValueError for numbers that do not fit the shape, and for bytes of another datatype than FP32.
        """
        if isinstance(self.content, list):
            with np.errstate(over="ignore"):
                return np.array(self.content, np.float32).reshape(self.shape)
        if self.datatype != "FP32":
            raise ValueError(f"the output is {self.datatype}, not FP32")
        return np.frombuffer(self.content, DTYPES["FP32"]).reshape(self.shape).astype(np.float32)


def read_output(body: bytes, json_size: int | None, name: str) -> OutputTensor:
    """Return the output named `name` of a response. json_size: bytes of JSON at the start of the body; None: all of it.

    Raises ValueError if the body is no such response, or has no such output.
    """
    try:
        start = len(body) if json_size is None else json_size
        outputs = json.loads(body[:start])["outputs"]
        names = [output["name"] for output in outputs]
        sizes = [(output.get("parameters") or {}).get("binary_data_size") for output in outputs]
        place = names.index(name)
        output, size = outputs[place], sizes[place]
        if start + sum(size or 0 for size in sizes) != len(body):
            raise ValueError("the binary tensors do not have the length that the response states")
        start += sum(size or 0 for size in sizes[:place])
        shape = [int(length) for length in output["shape"]]
        content = body[start : start + size] if size is not None else list(output["data"])
        return OutputTensor(str(output["datatype"]), shape, content)
    except MALFORMED as error:
        raise ValueError(one_line(error)) from None
