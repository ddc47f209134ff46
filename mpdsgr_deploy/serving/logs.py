"""Structured logs, one JSON object per line on stderr, and OpenTelemetry spans if that package is set up."""

import json
import logging
import os
import select
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol, TextIO

from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving.refusals import Refused
from mpdsgr_deploy.serving.served_model import ServedModel

MOST_WAITING = 10_000  # largest number of waiting log lines
LONGEST_PATH = 200  # characters of a path in a log line
requests = logging.getLogger("mpdsgr_deploy.requests")
try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None  # type: ignore[assignment]

NO_SPAN: AbstractContextManager[object] = nullcontext()


class RequestLog(Protocol):
    """A request of either protocol, as the log shows it."""

    id: str
    method: str
    path: str
    model: ServedModel | None
    images: int
    start: float

    @property
    def peer(self) -> str:
        """The client's address."""


class JsonLines(logging.Formatter):
    """Formats a record as JSON: time (seconds since 1970), level, message, `fields`, and the record's own `fields`."""

    def __init__(self, **fields: object) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields | self._fields | getattr(record, "fields", {}))


class Lines(logging.Handler):
    """Writes lines to a stream without blocking.

    A pipe that nobody reads would block the process. At most MOST_WAITING lines that the stream does not accept wait
    here, the oldest are lost, and the others are written once it accepts lines again.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream, self._waiting, self._lost = stream, deque[bytes](), 0
        self._poll: select.poll | None = None
        with suppress(OSError, ValueError):  # a stream in memory has no file descriptor
            self._file = stream.fileno()
            self._poll = select.poll()
            self._poll.register(self._file, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        if self._poll is None:
            self._stream.write(line)
            return
        if len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(line.encode())
        self._write()

    def flush(self) -> None:
        with self.lock or nullcontext():
            self._write()

    def _write(self) -> None:
        while self._waiting and self._takes():
            if self._lost:
                warning = {
                    "time": round(time.time(), 3),
                    "level": "warning",
                    "message": f"{self._lost} log lines are lost",
                }
                self._waiting.appendleft(json.dumps(warning).encode() + b"\n")
                self._lost = 0
            line = self._waiting.popleft()
            written = os.write(self._file, line[: select.PIPE_BUF])  # a pipe takes this many bytes at once, or none
            if written < len(line):
                self._waiting.appendleft(line[written:])

    def _takes(self) -> bool:
        return self._poll is not None and any(event & select.POLLOUT for _, event in self._poll.poll(0))


def log_json(**fields: object) -> None:
    """Write log lines to stderr as JSON with these fields; of other packages, only warnings and errors."""
    handler = Lines(sys.stderr)
    handler.setFormatter(JsonLines(**fields))
    log.setLevel(logging.INFO)
    log.handlers.clear()
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


def log_request(protocol: str, request: RequestLog, code: str, refused: Refused | None) -> None:
    """Log one line for a request, as a warning if the server failed or is overloaded."""
    fields: dict[str, Any] = {
        "request_id": request.id,
        "protocol": protocol,
        "method": request.method,
        "path": request.path[:LONGEST_PATH],
        "peer": request.peer,
        "code": code,
        "ms": round((time.monotonic() - request.start) * 1000, 3),
    }
    if request.model is not None:
        fields |= {"model": request.model.source.name, "version": request.model.version}
    if refused is None:
        requests.info("answered", extra={"fields": {**fields, "images": request.images}})
    else:
        level = logging.WARNING if refused.why.status >= 500 else logging.INFO
        requests.log(level, "%s", refused, extra={"fields": fields})


def span(headers: Mapping[str, str], model: ServedModel, request_id: str) -> AbstractContextManager[object]:
    """Return a span around an inference, a child of the client's span if the headers name one (W3C Trace Context)."""
    if trace is None:
        return NO_SPAN
    # get_tracer returns a real tracer only once a tracer provider is set up
    tracer = trace.get_tracer("mpdsgr_deploy")
    if isinstance(tracer, trace.ProxyTracer | trace.NoOpTracer):
        return NO_SPAN
    attributes = {"model": model.source.name, "version": model.version, "request_id": request_id}
    return tracer.start_as_current_span(
        "infer", context=propagate.extract(headers), kind=trace.SpanKind.SERVER, attributes=attributes
    )
