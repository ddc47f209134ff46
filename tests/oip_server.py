"""A small server of the Open Inference Protocol (v2, HTTP, with the binary tensor data extension), for tests.

It serves a Predictor as model `net`, says no to requests that break the protocol, notes when each inference request
came, and misbehaves where a test wants it to.
"""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from typing import Any, Self

import numpy as np

from mpdsgr_deploy.protocols import Predictor

HEADER = "Inference-Header-Content-Length"


class RefusedError(Exception):
    """A request that the server answers with 400."""


class _Listening(ThreadingHTTPServer):
    request_queue_size = 512  # the standard library's 5 lets connections wait a second to be tried again


class OipServer:
    """Serves for the length of a with block. `times`: when each inference request came, on the monotonic clock.

    inputs: [name, shape without the batch] of what the predictor takes, images first. binary: with the extension.
    datatype: of all of them, FP32 or UINT8. most: images a request. metrics: makes the page of that name. key: what
    every request must bear. meddle: called with the handler and the number of each inference request, from 0; if it
    returns True it has answered.
    """

    def __init__(
        self,
        network: Callable[..., np.ndarray] | Predictor,
        inputs: dict[str, tuple[int, ...]],
        *,
        binary: bool = True,
        datatype: str = "FP32",
        most: int = 1000,
        metrics: Callable[[], str] | None = None,
        key: str | None = None,
        port: int = 0,
        meddle: Callable[["Handler", int], bool | None] = lambda handler, number: None,
    ) -> None:
        self.network, self.inputs, self.binary, self.most, self.meddle = network, inputs, binary, most, meddle
        self.datatype, self.metrics, self.key = datatype, metrics, key
        self.times: list[float] = []
        self.extensions = ["binary_tensor_data"] if binary else []
        self._http = _Listening(("127.0.0.1", port), type("Bound", (Handler,), {"oip": self}))
        self._http.daemon_threads, self._http.block_on_close = True, False
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v2/models/net"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Accept nothing any more."""
        self._http.shutdown()
        self._http.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together
    disable_nagle_algorithm = True
    oip: OipServer

    def log_message(self, *arguments: object) -> None:
        """Silence."""

    def stranger(self) -> bool:
        """Whether the request bears another key than it must; then it has been answered."""
        if self.oip.key is None or self.headers["Authorization"] == f"Bearer {self.oip.key}":
            return False
        self.answer(401, {"error": "who are you?"})
        return True

    def do_GET(self) -> None:
        oip = self.oip
        if self.stranger():
            return
        described = {
            "name": "net",
            "platform": "onnx",
            "inputs": [{"name": n, "datatype": oip.datatype, "shape": [-1, *s]} for n, s in oip.inputs.items()],
            "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
        }
        known = {
            "/v2": {"name": "test", "version": "1", "extensions": oip.extensions},
            "/v2/health/live": {"live": True},
            "/v2/health/ready": {"ready": True},
            "/v2/models/net": described,
            "/v2/models/net/ready": {"ready": True},
        }
        if self.path == "/metrics" and oip.metrics is not None:
            self.answer(200, None, oip.metrics().encode())
        elif self.path in known:
            self.answer(200, known[self.path])
        else:
            self.answer(404, {"error": "no such thing"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.stranger():
            return None
        if self.path != "/v2/models/net/infer":
            return self.answer(404, {"error": "no such model"})
        self.oip.times.append(time.monotonic())
        if self.oip.meddle(self, len(self.oip.times) - 1):
            return None
        try:
            tensors, binary = self.understand(body)
        except (RefusedError, ValueError, KeyError, TypeError) as error:
            return self.answer(400, {"error": f"bad request: {error}"})
        return self.logits(self.oip.network(*tensors), binary=binary)

    def understand(self, body: bytes) -> tuple[list[np.ndarray], bool]:
        """The tensors in the order of the model's inputs, and whether the answer is to be binary."""
        header = self.headers.get(HEADER)
        if header is not None and not self.oip.binary:
            raise RefusedError("binary data are not understood here")
        place = len(body) if header is None else int(header)
        request = json.loads(body[:place])
        found = {}
        dtype = np.dtype("u1" if self.oip.datatype == "UINT8" else "<f4")
        for entry in request["inputs"]:
            shape, size = entry["shape"], entry.get("parameters", {}).get("binary_data_size")
            if entry["datatype"] != self.oip.datatype or shape[1:] != list(self.oip.inputs[entry["name"]]):
                raise RefusedError(f"{entry['name']} is not {self.oip.datatype} {self.oip.inputs[entry['name']]}")
            if shape[0] > self.oip.most:
                raise RefusedError(f"a batch of {shape[0]} is above {self.oip.most}")
            if size is None:
                tensor = np.array(entry["data"], dtype)
            else:
                if size != dtype.itemsize * prod(shape) or len(body) < place + size:
                    raise RefusedError(f"{size} bytes for shape {shape}")
                tensor = np.frombuffer(body[place : place + size], dtype)
                place += size
            found[entry["name"]] = tensor.reshape(shape)
        if header is not None and place != len(body):
            raise RefusedError("bytes are left over")
        (wanted,) = request.get("outputs", [{"name": "logits"}])
        if wanted["name"] != "logits":
            raise RefusedError(f"no output {wanted['name']}")
        every = request.get("parameters", {}).get("binary_data_output", False)
        return [found[name] for name in self.oip.inputs], wanted.get("parameters", {}).get("binary_data", every)

    def logits(self, found: np.ndarray, *, binary: bool, chunked: bool = False, **changed: Any) -> None:
        """An inference answer; `changed` fields of its output replace the right ones."""
        output: dict[str, Any] = {"name": "logits", "datatype": "FP32", "shape": list(found.shape)}
        data = b""
        if binary:
            data = found.astype("<f4").tobytes()
            output["parameters"] = {"binary_data_size": len(data)}
        else:
            output["data"] = found.ravel().tolist()
        content = {"model_name": "net", "outputs": [{**output, **changed}]}
        self.answer(200, content, data, chunked=chunked)

    def answer(
        self, status: int, content: Any, data: bytes | None = None, *, chunked: bool = False, **headers: str
    ) -> None:
        """JSON, and binary data behind it. headers: further ones, with _ for -."""
        head = b"" if content is None else json.dumps(content).encode()
        body = head + (data or b"")
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if data else "application/json")
        if data:
            self.send_header(HEADER, str(len(head)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(body), 100):
                piece = body[start : start + 100]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
