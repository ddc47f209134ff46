"""A running server of the Open Inference Protocol (v2, HTTP) as a Predictor."""

import json
import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.runtime.image_noise import NoiseSource
from mpdsgr_deploy.runtime.inference_protocol import BINARY, HEADER, encode_request, read_output

TIMEOUT = 60.0  # seconds for which the server may send nothing
ATTEMPTS = 5  # how often a request is sent to a server that says it is too busy
LONGEST_WAIT = 30.0  # longest time between two attempts that a server may ask for, in seconds
MOST = 256  # largest number of images per request
BUSY, TOO_LARGE = (429, 503), (400, 413)
MODEL_PATH = re.compile(r"(.*/v2)/models/[^/]+(/versions/[^/]+)?")


class ModelUrl(NamedTuple):
    """The URL of a served model. port: None: the scheme's default; path: that of the model; root: that of the server.

    The path ends in /v2/models/NAME or /v2/models/NAME/versions/VERSION, the root in /v2.
    """

    tls: bool
    host: str
    port: int | None
    path: str
    root: str

    @classmethod
    def split(cls, url: str) -> "ModelUrl":
        """Split http[s]://HOST:PORT/v2/models/NAME into its parts. Raises InputError for any other URL."""
        try:
            parts = urlsplit(url)
            host, port, path = parts.hostname, parts.port, MODEL_PATH.fullmatch(parts.path.rstrip("/"))
        except ValueError:  # the port or the address is malformed
            host = port = path = None
        unused = (parts.username, parts.query, parts.fragment) if path else ()
        if host is None or path is None or any(unused) or parts.scheme not in ("http", "https"):
            raise InputError(f"{url!r} names no model; write http://HOST:PORT/v2/models/NAME")
        return cls(parts.scheme == "https", host, port, path[0], path[1])


class RemoteModel(AbstractContextManager["RemoteModel"]):
    """The model behind `url` (http://HOST:PORT/v2/models/NAME), a Predictor for images [B, *shape].

    classes: the number K of logits. noise: the source of a stochastic network's noise inputs, unless the server draws
    the noise itself. rate: the largest number of requests per second, so that an evaluation does not starve a server's
    other clients. Tensors are sent as bytes if the server supports it, else as JSON, exactly in both; a batch that the
    server finds too large is halved. The connection closes at the end of a with block.

    Raises InputError for an invalid URL, for a rate that is not above 0, and for a server that cannot be reached,
    refuses, or answers with anything but finite logits [B, classes].
    """

    def __init__(
        self, url: str, shape: tuple[int, int, int], classes: int, *, noise: NoiseSource | None = None, rate: float = 20
    ) -> None:
        self._at = ModelUrl.split(url)
        self._server = _Server(self._at, url, rate)
        self._url, self._shape, self._classes, self._most = url, shape, classes, MOST
        self._noise = NoiseSource() if noise is None else noise
        try:
            self._introduce()
        except BaseException:
            self._server.close()
            raise

    def _introduce(self) -> None:
        """Ask the server for the model's inputs and outputs, and whether tensors may be sent as bytes."""
        described = self._server.ask("GET", self._at.path)
        if described.status != 200:
            raise self._refused(described)
        try:
            content = json.loads(described.body)
            inputs = {str(tensor["name"]): tensor for tensor in content["inputs"]}
            (self._input,) = inputs.keys() - self._noise.names
            others = {name: tuple(inputs[name]["shape"][1:]) for name in inputs if name != self._input}
            datatypes = {str(tensor["datatype"]) for tensor in inputs.values()}
            self._output = str(content["outputs"][0]["name"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(f"{self._url} does not describe a model of images: {excerpt(described.body)}") from None
        if datatypes != {"FP32"}:
            raise InputError(f"{self._url} takes {', '.join(sorted(datatypes))}; serve a network that takes FP32")
        if others:
            self._noise.require(others, self._url)
        else:
            self._noise = NoiseSource()  # the network takes no noise, or the server draws it
        self._binary = self._has(BINARY)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        check_images(x, self._shape)
        parts: list[NDArray[np.float32]] = []
        start = 0
        while start < len(x):
            images = x[start : start + self._most]
            tensors = {self._input: images, **self._noise(images)}
            request = encode_request(tensors, self._output, binary=self._binary)
            answer = self._server.ask("POST", f"{self._at.path}/infer", request.body, request.headers)
            if answer.status in TOO_LARGE and len(images) > 1:
                self._most = len(images) // 2
                continue
            if answer.status != 200:
                raise self._refused(answer)
            parts.append(self._logits(answer, len(images)))
            start += len(images)
        return np.concatenate(parts)

    def _has(self, extension: str) -> bool:
        answer = self._server.ask("GET", self._at.root)
        try:
            return answer.status == 200 and extension in json.loads(answer.body)["extensions"]
        except (KeyError, TypeError, ValueError):
            return False

    def _logits(self, answer: "_Answer", count: int) -> NDArray[np.float32]:
        try:
            json_size = answer.headers[HEADER]
            output = read_output(answer.body, None if json_size is None else int(json_size), self._output)
            if output.shape != [count, self._classes]:
                raise ValueError(f"the output has shape {output.shape}, not {[count, self._classes]}")
            logits = output.floats()
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._url} does not answer with logits: {one_line(error)}") from None
        if not np.isfinite(logits).all():
            raise InputError(f"{self._url} answers with logits that are not finite")
        return logits

    def _refused(self, answer: "_Answer") -> InputError:
        if 300 <= answer.status < 400:
            place = answer.headers["Location"]
            return InputError(f"{self._url} redirects to {place}; give the URL of the server itself")
        return InputError(f"{self._url} answers {answer.status}: {excerpt(answer.body)}")

    def __exit__(self, *exception: object) -> None:
        self._server.close()


class _Answer(NamedTuple):
    status: int
    body: bytes
    headers: Message


class _Server:
    """Sends requests on one connection that is kept open, at most `rate` per second. url: named in error messages."""

    def __init__(self, at: ModelUrl, url: str, rate: float) -> None:
        if not rate > 0:
            raise InputError(f"a rate of {rate:g} requests per second sends nothing; give a number above 0")
        kind = HTTPSConnection if at.tls else HTTPConnection
        self._connection = kind(at.host, at.port, timeout=TIMEOUT)
        self._url, self._rate = url, rate
        self._next = 0.0  # time before which no request may be sent

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = MappingProxyType({})
    ) -> _Answer:
        """Return the answer to a request. A busy server is asked up to ATTEMPTS times, after the time that it names."""
        answer = self._once(method, path, body, headers)
        for attempt in range(ATTEMPTS - 1):
            if answer.status not in BUSY:
                break
            self._next += _seconds(answer.headers["Retry-After"], 2.0**attempt)
            answer = self._once(method, path, body, headers)
        return answer

    def _once(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> _Answer:
        is_reused = self._connection.sock is not None  # the server may have closed it since the last request
        try:
            return self._send(method, path, body, headers)
        except TimeoutError:
            self.close()
            raise InputError(f"{self._url} does not answer within {TIMEOUT:g} s; is the server overloaded?") from None
        except (HTTPException, OSError) as error:
            self.close()
            if not is_reused:
                raise InputError(f"cannot reach {self._url}: {one_line(error)}; is the server running?") from None
        return self._once(method, path, body, headers)

    def _send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> _Answer:
        """Send one request as soon as the rate allows it."""
        wait = self._next - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        self._next = time.monotonic() + 1 / self._rate
        self._connection.request(method, path, body or None, headers)
        response = self._connection.getresponse()
        return _Answer(response.status, response.read(), response.headers)

    def close(self) -> None:
        self._connection.close()


def excerpt(body: bytes) -> str:
    """Return the first 200 characters of a response's body, on one line, for an error message."""
    return one_line(body.decode(errors="replace"))[:200] if body else "nothing"


def _seconds(header: str | None, otherwise: float) -> float:
    """Return the seconds that a Retry-After header asks for, at most LONGEST_WAIT; `otherwise` without a number."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(header or "")))
    except ValueError:
        return otherwise
