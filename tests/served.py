"""A real `mpdsgr serve` process for tests, and a client that sends it bytes as they are."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import parse_headers
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from zygote import READ_AT_START, Forked, read_at_start

from mpdsgr_deploy.runtime.inference_protocol import encode_request

HELD_BACKEND = Path(__file__).parent / "held_backend"
LARGE = 10_000  # images: a batch at which that backend can be made to stand still
BUNDLE = Path(__file__).parent.parent / "export" / "doctor" / "bundle"  # images [1, 8, 8] named "images", 10 labels
VERSION = json.loads((BUNDLE / "manifest.json").read_text())["digest"][:12]  # that BUNDLE is served as
INFER = "/v2/models/bundle/infer"  # of BUNDLE


class Served:
    """The command with these arguments, ready when the constructor returns; ended at the end of a with block.

    arguments: models and options; ports are free ones unless given. limits: settings of the section `limits`.
    lines: of the log so far, parsed. wait: False returns while the server still loads, without ports. gate: a file;
    the server's backend stands still at a large batch while it exists (see held_backend), as `hold` makes it do.
    """

    def __init__(
        self,
        *arguments: object,
        limits: dict[str, object] | None = None,
        wait: bool = True,
        gate: Path | None = None,
    ) -> None:
        words = ["serve", *map(str, arguments or [BUNDLE])]
        for option in ("--port", "--grpc-port"):
            words += [] if option in words else [option, "0"]
        for key, value in {"grace_seconds": 0, **(limits or {})}.items():
            words += ["--set", f"limits.{key}={value}"]
        self._gate = gate
        self._process = _started(words) if gate is None else _started_with_held_backend(words, gate)
        self.pid, self.port, self.grpc_port = self._process.pid, 0, 0
        self.lines: list[dict[str, Any]] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            self.wait()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"level": "", "message": line.rstrip("\n")}  # no log line, such as the error at the end
            self.lines.append(entry)
            if ports := re.match(r"serving on \S+:(\d+)(?:, gRPC on port (\d+))?", entry["message"]):
                self.port, self.grpc_port = int(ports[1]), int(ports[2] or 0)
                self._ready.set()
        self._ready.set()

    def wait(self, seconds: float = 60) -> None:
        """Until it serves. Raises AssertionError with the log if it ends or takes longer."""
        if not self._ready.wait(seconds) or not self.port:
            self.stop(signal.SIGKILL)
            raise AssertionError(f"the server did not start: {self.lines}")

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 60) -> int:
        """Its exit code; its log is complete then."""
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._reader.join(60)
        return self._process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        assert self._process.stderr is not None
        self._process.stderr.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def signal(self, how: signal.Signals) -> None:
        """Send it a signal and go on."""
        self._process.send_signal(how)

    @contextmanager
    def hold(self) -> Iterator["Connection"]:
        """While the network stands still at a large batch, whose answer is the next on this connection behind it."""
        assert self._gate is not None
        entered = self._gate.with_suffix(".entered")
        entered.unlink(missing_ok=True)
        self._gate.touch()
        try:
            with self.connect() as connection:
                connection.send(large_request())
                assert eventually(entered.exists)
                yield connection
                self._gate.unlink()
                assert connection.reply().status == 200
        finally:
            self._gate.unlink(missing_ok=True)

    def rss(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def connect(self, seconds: float = 60) -> "Connection":
        """A new connection whose every read takes at most so long."""
        return Connection(self.port, seconds)

    def ask(self, request: bytes, seconds: float = 60) -> "Reply":
        """The answer to one request on a connection of its own."""
        with self.connect(seconds) as connection:
            connection.send(request)
            return connection.reply()

    def get(self, path: str) -> "Reply":
        return self.ask(http("GET", path))

    def post(self, path: str, body: bytes | dict[str, Any], headers: dict[str, object] | None = None) -> "Reply":
        return self.ask(http("POST", path, body, headers))

    def metrics(self) -> dict[str, float]:
        """By name and labels as they stand in the text: `mpdsgr_connections`, `name{a="b"}`."""
        lines = self.get("/metrics").body.decode().splitlines()
        return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def counted(self, name: str, **labels: str) -> float:
        """The sum of a metric over all that have these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = self.metrics().items()
        return sum(v for key, v in found if key.partition("{")[0] == name and all(text in key for text in wanted))


def _started(words: list[str]) -> "subprocess.Popen[str] | Forked":
    """`mpdsgr` with these words: forked, or afresh where a test has changed what decides how a program starts."""
    if read_at_start() == READ_AT_START:
        return Forked(words, {})
    command = [sys.executable, "-m", "mpdsgr_deploy", *words]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _started_with_held_backend(words: list[str], gate: Path) -> Forked:
    prelude = f"import sys; sys.path.insert(0, {str(HELD_BACKEND)!r})"
    return Forked([*words, "--backend", "held"], {"HELD_GATE": str(gate)}, prelude)


class Reply(NamedTuple):
    """An answer over HTTP; headers by name in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def output(self, name: str = "logits") -> NDArray[np.float32]:
        """A numeric output of an answer in JSON."""
        (found,) = (output for output in self.json()["outputs"] if output["name"] == name)
        return np.array(found["data"], np.float32).reshape(found["shape"])


class Connection:
    """Bytes there and answers back."""

    def __init__(self, port: int, seconds: float = 60) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), seconds)
        self._file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """All of it, or as much as the server takes before it closes: its answer tells."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def reply(self, *, head: bool = False) -> Reply:
        """The next answer; head: to a HEAD request, which has no body. Raises ConnectionError where none is whole."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("closed without an answer")
        headers = {name.lower(): value for name, value in parse_headers(self._file).items()}
        status = int(line.split()[1])
        if "content-length" not in headers and status != 100:
            raise ConnectionError("closed in the middle of an answer's head")
        length = 0 if head or status == 100 else int(headers["content-length"])
        body = self._file.read(length)
        if len(body) < length:  # a server that closes on a client which still sends cuts off what is on its way
            raise ConnectionError("closed in the middle of an answer")
        return Reply(status, headers, body)

    def closed(self) -> bool:
        """Wait for the server's end of the connection; False if more comes instead."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def http(
    method: str, path: str, body: bytes | dict[str, Any] | None = None, headers: dict[str, object] | None = None
) -> bytes:
    """A request's bytes; Content-Length is added where there is a body and no other word on its length."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body or b""
    told = {"Host": "localhost", **(headers or {})}
    if body is not None and not {"content-length", "transfer-encoding"} & {name.lower() for name in told}:
        told["Content-Length"] = len(content)
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + content


def images(count: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """Random images that BUNDLE's network takes."""
    return np.random.default_rng(seed).random((count, 1, 8, 8), np.float32)


def request(x: NDArray[np.float32], **entries: Any) -> dict[str, Any]:
    """An inference request in JSON; entries: further ones of the request."""
    tensor = {"name": "images", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    return {"inputs": [tensor], **entries}


def large_request() -> bytes:
    """An inference request of LARGE images in binary form."""
    headers, body = encode_request({"images": np.zeros((LARGE, 1, 8, 8), np.uint8)}, "margin", binary=True)
    return http("POST", INFER, body, headers)


def eventually(condition: Any, seconds: float = 60) -> bool:
    """Whether it becomes true in this time, which is far more than it takes on a machine with other work."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
