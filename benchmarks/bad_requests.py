"""Requests that no server should answer with 200 or 5xx: whole HTTP messages, and calls of gRPC."""

import gzip
import json
from collections.abc import Iterator
from math import prod
from typing import Any

from mpdsgr_deploy.serving.load.target_model import TargetModel

LENGTH = "Inference-Header-Content-Length"


def http(model: TargetModel) -> dict[str, bytes]:
    """Whole requests by what is wrong with them. A server may close the connection after any."""
    return {**_tensors(model), **_bodies(model), **_heads(model)}


def _tensors(model: TargetModel) -> dict[str, bytes]:
    """One that would be good, with some claims of its JSON replaced, or other bytes behind it."""
    (tensor,) = model.inputs
    pixels = bytes(4 * prod(tensor.shape))

    def request(
        raw: bytes = pixels, length: str | None = None, outputs: Any = (), top: Any = (), **claims: Any
    ) -> bytes:
        claims = {"parameters": {"binary_data_size": len(raw)}, **claims}
        entry = {"name": tensor.name, "datatype": "FP32", "shape": [1, *tensor.shape], **claims}
        entry = {name: value for name, value in entry.items() if value is not None}
        head = json.dumps({"inputs": [entry], "outputs": list(outputs), **dict(top)}).encode()
        return _post(model, head + raw, {LENGTH: length or str(len(head))})

    def numbers(value: str) -> bytes:
        """In JSON, all of one value."""
        data = f"[{','.join([value] * prod(tensor.shape))}]"
        shape = [1, *tensor.shape]
        entry = f'{{"name":"{tensor.name}","datatype":"FP32","shape":{shape},"data":{data}}}'
        return _post(model, f'{{"inputs":[{entry}]}}'.encode())

    nan, infinite, above = b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\x40"
    shape = [1, *tensor.shape]
    return {
        "another name": request(name="nobody"),
        "a name that is a number": request(name=7),
        "another type": request(datatype="FP64"),
        "no type": request(datatype=None),
        "a rank too few": request(shape=shape[1:]),
        "a rank too many": request(shape=[1, *shape]),
        "another shape": request(shape=[1, tensor.shape[0], tensor.shape[1] * 2, tensor.shape[2] // 2]),
        "no images": request(b"", shape=[0, *tensor.shape]),
        "a negative batch": request(shape=[-1, *tensor.shape]),
        "a batch that is true": request(shape=[True, *tensor.shape]),
        "a batch with a fraction": request(shape=[1.0, *tensor.shape]),
        "a trillion images": request(shape=[10**12, *tensor.shape]),
        "a shape beyond 64 bits": request(shape=[2**70, *tensor.shape]),
        "no shape": request(shape=None),
        "a batch above the limit": request(pixels * 65, shape=[65, *tensor.shape]),
        "fewer bytes than the shape": request(pixels[:-4]),
        "more bytes than the shape": request(pixels + b"\0\0\0\0"),
        "a size beyond the body": request(parameters={"binary_data_size": 10**9}),
        "a negative size": request(parameters={"binary_data_size": -1}),
        "a size that is text": request(parameters={"binary_data_size": "12288"}),
        "data twice": request(data=[0.5]),
        "shared memory": request(parameters={"shared_memory_region": "x", "shared_memory_byte_size": 4}),
        "NaN": request(nan + pixels[4:]),
        "infinity": request(infinite + pixels[4:]),
        "a pixel of 2": request(above + pixels[4:]),
        "NaN in JSON": numbers("NaN"),
        "1e999 in JSON": numbers("1e999"),
        "text in JSON": numbers('"0"'),
        "null in JSON": numbers("null"),
        "true in JSON": numbers("true"),
        "a pixel of -1 in JSON": numbers("-1"),
        "an unknown output": request(outputs=[{"name": "nobody"}]),
        "an output twice": request(outputs=[{"name": model.output.name}] * 2),
        "an output that is a list": request(outputs=[[]]),
        "negative classes": request(outputs=[{"name": model.output.name, "parameters": {"classification": -1}}]),
        "a timeout that is text": request(top=[("parameters", {"timeout": "soon"})]),
        "an id that is a number": request(top=[("id", 7)]),
        "inputs that are a number": request(top=[("inputs", 7)]),
        "two inputs": request(b"", top=[("inputs", [{}, {}])]),
        "a header longer than the body": request(length="999999"),
        "a header shorter than the JSON": request(length="10"),
        "a negative header": request(length="-5"),
        "a header that is text": request(length="many"),
    }


def late(model: TargetModel) -> bytes:
    """A valid request of 64 images that gives the server a microsecond."""
    (tensor,) = model.inputs
    entry = {"name": tensor.name, "datatype": "UINT8", "shape": [64, *tensor.shape]}
    raw = bytes(64 * prod(tensor.shape))
    top = {"inputs": [{**entry, "parameters": {"binary_data_size": len(raw)}}], "parameters": {"timeout": 1}}
    head = json.dumps(top).encode()
    return _post(model, head + raw, {LENGTH: str(len(head))})


def _bodies(model: TargetModel) -> dict[str, bytes]:
    return {
        "no body": _post(model, b""),
        "no JSON": _post(model, b"\xff\xfe\x00hello"),
        "JSON that ends too early": _post(model, b'{"inputs": [{"name": "ima'),
        "JSON with more behind it": _post(model, b'{"inputs": []} {}'),
        "a JSON list": _post(model, b"[]"),
        "no inputs": _post(model, b"{}"),
        "JSON 100,000 deep": _post(model, b'{"inputs":' + b"[" * 100_000),
        "an integer of 100,000 digits": _post(model, b'{"inputs":' + b"9" * 100_000 + b"}"),
        "a broken gzip": _post(model, b"\x1f\x8b\x08nonsense", {"Content-Encoding": "gzip"}),
        "half a gzip": _post(model, gzip.compress(b"{}" * 1000)[:-8], {"Content-Encoding": "gzip"}),
        "a gzip bomb": _post(model, gzip.compress(bytes(1 << 26)), {"Content-Encoding": "gzip"}),
        "an unknown encoding": _post(model, b"{}", {"Content-Encoding": "br"}),
    }


def _heads(model: TargetModel) -> dict[str, bytes]:
    endpoint, path = model.endpoint, model.endpoint.at.path
    message = endpoint.message
    head = f"POST {path}/infer HTTP/1.1\r\nHost: {endpoint.authority}\r\n"
    return {
        "an unknown model": message("POST", f"{endpoint.at.root}/models/nobody/infer", b"{}"),
        "an unknown version": message("POST", f"{path}/versions/999/infer", b"{}"),
        "a version that is text": message("POST", f"{path}/versions/../infer", b"{}"),
        "a path upwards": message("GET", "/v2/models/../../../../etc/passwd"),
        "an encoded path upwards": message("GET", "/v2/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd"),
        "a path with zeros": message("GET", "/v2/models/%00%ff"),
        "GET instead of POST": message("GET", f"{path}/infer"),
        "DELETE": message("DELETE", path),
        "an unknown method": message("BREW", f"{path}/infer"),
        "loading a model": message("POST", f"{endpoint.at.root}/repository/models/x/load", b"{}"),
        "a body of a terabyte": f"{head}Content-Length: 1099511627776\r\n\r\n".encode(),
        "a length that is text": f"{head}Content-Length: many\r\n\r\n".encode(),
        "two lengths": f"{head}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}".encode(),
        "a chunk that is none": f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
        "headers of 100 kB": message("POST", f"{path}/infer", b"{}", {"X-Long": "x" * 100_000}),
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    }


def _post(model: TargetModel, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    return model.endpoint.message("POST", f"{model.endpoint.at.path}/infer", body, headers or {})


def grpc(model: TargetModel) -> Iterator[tuple[str, Any]]:
    """Calls of ModelInfer by what is wrong with them."""
    from tritonclient.grpc import service_pb2 as pb

    (tensor,) = model.inputs
    pixels = bytes(4 * prod(tensor.shape))

    def request(data: bytes | None = pixels, model_name: str = "", version: str = "", **claims: Any) -> Any:
        claims = {"name": tensor.name, "datatype": "FP32", "shape": [1, *tensor.shape], **claims}
        name = model_name or model.endpoint.at.path.rpartition("/")[2]
        asked = pb.ModelInferRequest(model_name=name, model_version=version)
        asked.inputs.add(**claims)
        if data is not None:
            asked.raw_input_contents.append(data)
        return asked

    yield "an unknown model", request(model_name="nobody")
    yield "an unknown version", request(version="999")
    yield "another name", request(name="nobody")
    yield "another type", request(datatype="INT8")
    yield "another shape", request(shape=[1, 2, 3, 4])
    yield "a negative batch", request(shape=[-1, *tensor.shape])
    yield "a trillion images", request(shape=[10**12, *tensor.shape])
    yield "no data", request(None)
    yield "fewer bytes than the shape", request(pixels[:-4])
    yield "NaN", request(b"\0\0\xc0\x7f" + pixels[4:])
    typed = request()
    typed.inputs[0].contents.fp32_contents.append(0.5)
    yield "data twice", typed
    shared = request()
    shared.inputs[0].parameters["shared_memory_region"].string_param = "x"
    yield "shared memory", shared
    twice = request()
    twice.raw_input_contents.append(pixels)
    yield "more contents than inputs", twice
    unknown = request()
    unknown.outputs.add(name="nobody")
    yield "an unknown output", unknown
    negative = request()
    negative.outputs.add(name=model.output.name).parameters["classification"].int64_param = -1
    yield "negative classes", negative
    yield "no inputs", pb.ModelInferRequest(model_name=request().model_name)
