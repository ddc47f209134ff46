"""The cases of fuzz.py: valid inference requests, changed in structure or in bytes, and the numbers that they carry."""

import gzip
import json
import random
import zlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
from tritonclient.grpc import service_pb2 as pb

HEADER = "Inference-Header-Content-Length"
MODEL = "fuzzed"
MOST = 8  # images a request
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e39, 1e400, float("nan"), 2**31, 2**63, 2**64, 10**30, 10**400),
    *("", "0", "images", "logits", "margin", "FP32", "UINT8", "BYTES", "\ud800", "\0", "\u0661", "x" * 300),
    *([], {}, [[]], [{}], [0.5], [1, 1, 8, 8], {"name": "logits"}, {"timeout": 1}, {"binary_data_size": 256}),
)
KEYS = (
    *("id", "parameters", "inputs", "outputs", "name", "datatype", "shape", "data", "binary_data", "timeout"),
    *("binary_data_size", "binary_data_output", "classification", "shared_memory_region", "priority", "x"),
)
PATHS = (
    *("/", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats", "/status", "/v2/repository/index"),
    *(f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/config", f"/v2/models/{MODEL}/versions/1/infer", "/v2/models/../x"),
)
# Empty inputs, outputs and contents, which take a hundred times as much memory as objects
EMPTY = (b"\x2a\0", b"\x32\0", b"\x3a\0")
INFER = f"/v2/models/{MODEL}/infer"


class Case(NamedTuple):
    """protocol: http, or a gRPC method. content: all bytes of the request. whole: its framing was left as it must be.

    carried: the images in it, read from the request as it is; raises if they cannot be read. timed: it may ask for a
    time to be answered in.
    """

    protocol: str
    content: bytes
    whole: bool
    carried: Callable[[], np.ndarray]
    timed: bool = False


def case(rng: random.Random) -> Case:
    """Any."""
    kind = rng.random()
    if kind < 0.25:
        return _grpc(rng)
    if kind < 0.30:
        path = rng.choice(PATHS)
        body = rng.choice((b"", b"{}", b"[]", rng.randbytes(rng.randrange(100))))
        method = rng.choice(("GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH"))
        return Case("http", _message(method, path, body, {}, rng), True, _nothing)
    content, head, body = _structured(rng)
    if kind < 0.75:
        return Case("http", content, True, lambda: _read(head, body), b"timeout" in head)
    content = flipped(content, rng)
    return Case("http", content, False, lambda: _read_bytes(content), b"timeout" in head)


def _nothing() -> np.ndarray:
    raise AssertionError("this was no inference request")


def _images(rng: random.Random) -> np.ndarray:
    n = rng.choice((1, 1, 1, 2, 3, MOST))
    return np.frombuffer(rng.randbytes(n * 64), "u1").reshape(n, 1, 8, 8)


def _structured(rng: random.Random) -> tuple[bytes, bytes, bytes]:
    """A message, the JSON in it, and what follows the JSON in its body."""
    pixels = _images(rng)
    x = pixels if rng.random() < 0.3 else (pixels / np.float32(255)).astype("<f4")
    tensor: dict[str, Any] = {"name": "images", "datatype": "UINT8" if x is pixels else "FP32", "shape": [*x.shape]}
    told: dict[str, Any] = {"inputs": [tensor]}
    if rng.random() < 0.5:
        told["outputs"] = [{"name": "logits", "parameters": {"binary_data": False}}]
    if rng.random() < 0.3:
        told |= {"id": "a", "parameters": {"timeout": rng.choice((0, 10**7))}}
    raw = b""
    headers: dict[str, Any] = {}
    if rng.random() < 0.5:
        raw = x.tobytes()
        tensor["parameters"] = {"binary_data_size": len(raw)}
    else:
        tensor["data"] = x.tolist() if rng.random() < 0.3 else x.ravel().tolist()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        _change(told, rng)
    head = json.dumps(told).encode("utf-8", "surrogatepass")
    if raw and rng.random() < 0.1:
        raw = flipped(raw, rng)
    if raw or rng.random() < 0.05:
        lie = rng.choice((-1, "+5", "1_0", "", 0, len(head) - 1, len(head) + len(raw) + 1, 10**12))
        headers[HEADER] = lie if rng.random() < 0.1 else len(head)
    return _message("POST", INFER, head + raw, headers, rng), head, raw


def _message(method: str, path: str, body: bytes, headers: dict[str, Any], rng: random.Random) -> bytes:
    """Framed right; compressed or in chunks at times."""
    kind = rng.random()
    if kind < 0.1:
        packed = gzip.compress(body, 1) if kind < 0.05 else zlib.compress(body)
        body = flipped(packed, rng) if rng.random() < 0.3 else packed
        headers = {**headers, "Content-Encoding": "gzip" if kind < 0.05 else "deflate"}
    if 0.08 < kind < 0.2:
        size = rng.randrange(1, 400)
        parts = [body[i : i + size] for i in range(0, len(body), size)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        headers = {**headers, "Transfer-Encoding": "chunked"}
    else:
        headers = {**headers, "Content-Length": len(body)}
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "localhost", **headers}.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def _change(told: Any, rng: random.Random) -> None:
    """Something somewhere in a JSON value."""
    while True:
        items = [*told.items()] if isinstance(told, dict) else [*enumerate(told)]
        if not items or rng.random() < 0.3:
            break
        key, value = rng.choice(items)
        if not isinstance(value, dict | list):
            told[key] = _odd(rng, value) if rng.random() < 0.5 else rng.random()
            return
        if rng.random() < 0.15:
            told[key] = _odd(rng)
            return
        told = value
    if isinstance(told, dict):
        if told and rng.random() < 0.4:
            del told[rng.choice([*told])]
        else:
            told[rng.choice(KEYS)] = _odd(rng)
    elif told and rng.random() < 0.5:
        told.pop(rng.randrange(len(told)))
    else:
        told.insert(rng.randrange(len(told) + 1), _odd(rng, *told[:1]))


def _odd(rng: random.Random, *others: Any) -> Any:
    return deepcopy(rng.choice((*ODD, *others)))  # or a later change would change all cases


def flipped(content: bytes, rng: random.Random) -> bytes:
    """With some bytes changed, lost, doubled or put in."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(found) + 1)
        match rng.randrange(6):
            case 0:
                found[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del found[place : place + rng.choice((1, 1, 4, 64))]
            case 2:
                found[place:place] = rng.randbytes(rng.choice((1, 1, 4, 64)))
            case 3:
                found[place:place] = found[place : place + rng.choice((1, 8, 256))]
            case 4 if place < len(found):
                found[place] ^= 1 << rng.randrange(8)
            case _:
                found[place:place] = rng.choice((b"\r\n", b"\0", b"9" * 40, b"{", b"]", b"-", b",", b"\xff" * 9))
    return bytes(found)


def _read(head: bytes, raw: bytes) -> np.ndarray:
    (tensor,) = json.loads(head)["inputs"]
    kind = {"FP32": "<f4", "UINT8": "u1"}[tensor["datatype"]]
    x = np.array(tensor["data"], np.float64).astype(kind) if "data" in tensor else np.frombuffer(raw, kind)
    x = x.reshape(tensor["shape"])
    return x / np.float32(255) if kind == "u1" else x


def _read_bytes(content: bytes) -> np.ndarray:
    """Of an HTTP message whose framing may have been changed and still was understood."""
    top, _, body = content.partition(b"\r\n\r\n")
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in top.split(b"\r\n")[1:])
    }
    if b"chunked" in headers.get(b"transfer-encoding", b""):
        body, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size.partition(b";")[0], 16)
            body, rest = body + rest[:length], rest[length + 2 :]
            if not length:
                break
    else:
        body = body[: int(headers[b"content-length"])]
    if headers.get(b"content-encoding", b"identity").lower() in (b"gzip", b"deflate"):
        body = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body)
    length = int(headers.get(HEADER.lower().encode(), len(body)))
    return _read(body[:length], body[length:])


def _grpc(rng: random.Random) -> Case:
    if rng.random() < 0.1:
        method = rng.choice(("ServerLive", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "Nope"))
        return Case(method, flipped(pb.ModelReadyRequest(name=MODEL).SerializeToString(), rng), True, _nothing)
    pixels = _images(rng)
    message = pb.ModelInferRequest(model_name=MODEL, id="a" * rng.randrange(2))
    tensor = message.inputs.add(name="images", datatype="FP32", shape=pixels.shape)
    x = (pixels / np.float32(255)).astype("<f4")
    if rng.random() < 0.3:
        tensor.datatype = "UINT8"
        x = pixels
    if rng.random() < 0.5:
        message.raw_input_contents.append(x.tobytes())
    else:
        field = tensor.contents.fp32_contents if x is not pixels else tensor.contents.uint_contents
        field.extend(x.ravel().tolist())
    if rng.random() < 0.3:
        message.outputs.add(name="logits")
    if rng.random() < 0.2:
        message.parameters["timeout"].int64_param = 10**7
    content = message.SerializeToString()
    if rng.random() < 0.05:
        return Case("ModelInfer", content + rng.choice(EMPTY) * rng.choice((1, 100, 5000)), True, _nothing)
    if rng.random() < 0.85:
        content = flipped(content, rng)
    return Case("ModelInfer", content, True, lambda: _read_message(content), b"timeout" in content)


def _read_message(content: bytes) -> np.ndarray:
    message = pb.ModelInferRequest.FromString(content)
    (tensor,) = message.inputs
    kind = {"FP32": "<f4", "UINT8": "u1"}[tensor.datatype]
    typed = tensor.contents.fp32_contents if kind == "<f4" else tensor.contents.uint_contents
    x = np.frombuffer(message.raw_input_contents[0], kind) if message.raw_input_contents else np.array(typed, kind)
    x = x.reshape(tuple(tensor.shape))
    return x / np.float32(255) if kind == "u1" else x
