"""Structured logs: one JSON object a line on stderr."""

import json
import logging
import time
from typing import Any, Protocol

from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving.errors import Refused
from mpdsgr_deploy.serving.model import ServedModel

requests = logging.getLogger("mpdsgr_deploy.requests")


class Told(Protocol):
    """What is known of a request, whatever protocol it came by."""

    id: str
    method: str
    path: str
    model: ServedModel | None
    images: int
    start: float


class JsonLines(logging.Formatter):
    """time (s since 1970), level, message, and the fields that a record carries in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told | getattr(record, "fields", {}))


def log_json() -> None:
    """Send all log lines and warnings to stderr as JSON; of other packages, only warnings and errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    log.setLevel(logging.INFO)
    log.handlers.clear()
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


def log_request(protocol: str, told: Told, code: str, refused: Refused | None) -> None:
    """One line for a request; a warning if the server is at fault or overloaded."""
    fields: dict[str, Any] = {
        "request_id": told.id,
        "protocol": protocol,
        "method": told.method,
        "path": told.path,
        "code": code,
        "ms": round((time.monotonic() - told.start) * 1000, 3),
    }
    if told.model is not None:
        fields |= {"model": told.model.source.name, "version": told.model.version}
    if refused is None:
        requests.info("answered", extra={"fields": {**fields, "images": told.images}})
    else:
        level = logging.WARNING if refused.why.status >= 500 else logging.INFO
        requests.log(level, "%s", refused, extra={"fields": fields})
