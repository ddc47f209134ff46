"""A running server of the Open Inference Protocol (v2, HTTP) as a Predictor."""

import json
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.runtime.images import check_images

TIMEOUT = 60.0  # seconds a request may take
ATTEMPTS = 5  # at a server that says it is too busy (503, 429)
LONGEST_WAIT = 30.0  # seconds between two of them


class RemoteModel:
    """The model behind `url` (http://HOST:PORT/v2/models/NAME), a Predictor for images [B, *shape].

    rate: requests a second, at most, so that an evaluation does not starve a server's other clients. Images travel in
    the protocol's binary form, bit for bit. A context manager, which closes the connection. Raises InputError for a URL
    that is none, a server that cannot be reached, refuses, or answers with anything but finite logits [B, classes].
    """

    def __init__(self, url: str, shape: tuple[int, int, int], classes: int, *, rate: float = 20.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "/v2/models/" not in parts.path:
            raise InputError(f"{url!r} names no model; write http://HOST:PORT/v2/models/NAME")
        kind = HTTPConnection if parts.scheme == "http" else HTTPSConnection
        self._connection = kind(parts.hostname, parts.port, timeout=TIMEOUT)
        self._url, self._path = url, parts.path.rstrip("/")
        self._shape, self._classes, self._rate = shape, classes, rate
        self._next = 0.0  # when the next request may leave
        content, _ = self._ask("GET", "", b"", {})
        try:
            described = json.loads(content)
            (self._input,), (self._output, *_) = described["inputs"], described["outputs"]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{url} does not describe a model of one input: {content[:200]!r}") from None

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        check_images(x, self._shape)
        data = np.ascontiguousarray(x, "<f4").tobytes()
        asked = {"name": self._input["name"], "shape": list(x.shape), "datatype": "FP32"}
        asked["parameters"] = {"binary_data_size": len(data)}
        wanted = {"name": self._output["name"], "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [asked], "outputs": [wanted]}).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        body, header = self._ask("POST", "/infer", head + data, headers)
        return self._logits(body, header, len(x))

    def _logits(self, body: bytes, header: int, count: int) -> NDArray[np.float32]:
        """The first output [count, classes]: its data follow the JSON, `header` bytes long, or stand in it."""
        try:
            output = json.loads(body[:header])["outputs"][0]
            size = output.get("parameters", {}).get("binary_data_size")
            if size is None:
                found = np.array(output["data"], np.float32)
            else:
                found = np.frombuffer(body[header : header + size], "<f4").astype(np.float32)
            logits = found.reshape(count, self._classes)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(f"{self._url} answers with something else than logits ({one_line(error)})") from None
        if not np.isfinite(logits).all():
            raise InputError(f"{self._url} answers with logits that are not finite")
        return logits

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[bytes, int]:
        """The body of an answer and how long its JSON is, at the allowed rate.

        A server that is too busy is asked again after the time it names.
        """
        for attempt in range(ATTEMPTS):
            wait = self._next - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            self._next = time.monotonic() + 1 / self._rate
            response, content = self._once(method, path, body, headers)
            if response.status == 200:
                return content, int(response.getheader("Inference-Header-Content-Length") or len(content))
            if response.status not in (429, 503) or attempt == ATTEMPTS - 1:
                break
            self._next += _seconds(response.getheader("Retry-After"), 2.0**attempt)
        told = one_line(content.decode(errors="replace"))[:200]
        raise InputError(f"{self._url}{path} answers {response.status}: {told}")

    def _once(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[HTTPResponse, bytes]:
        for attempt in (0, 1):  # a kept-alive connection may have been closed by the server meanwhile
            try:
                self._connection.request(method, self._path + path, body or None, headers)
                response = self._connection.getresponse()
                return response, response.read()
            except (HTTPException, OSError) as error:
                self._connection.close()
                if attempt:
                    told = one_line(error)
        raise InputError(f"cannot reach {self._url}: {told}; is the server running?")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()


def _seconds(header: str | None, otherwise: float) -> float:
    """What a Retry-After header asks for, within reason."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(header or "")))
    except ValueError:
        return otherwise
