"""Encode HTTP/1.1 responses and refusals, and change requests that httptools would misread."""

import re
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import unquote

import httptools

from mpdsgr_deploy.serving.errors import Refused, Why
from mpdsgr_deploy.serving.http import Reply, refusal_reply, response_headers

UPGRADE = re.compile(rb"(?i)\r\nupgrade:")
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HEAD_BYTES = 1 << 16  # of a request line and its headers, or of anything else that brings no body

# answers to what never becomes a request
BAD = Refused(Why.INVALID, "this is no HTTP/1.1 request")
SLOW = Refused(Why.SLOW, "the request's head did not arrive in time")
TOO_LONG = Refused(Why.HEADERS, f"a request's head may have {HEAD_BYTES} bytes")
PIPELINE_FULL = Refused(Why.BUSY, "too many requests wait on this connection; try again soon")
BUSY = Refused(Why.BUSY, "too many connections; try again soon")


def encode_reply(reply: Reply, request_id: str, *, keep_alive: bool, with_body: bool = True) -> bytes:
    """Encode a whole response. with_body: False for HEAD, whose response states only the body's length."""
    parts = [STATUS_LINES.get(reply.status) or b"HTTP/1.1 %d Closed\r\n" % reply.status]
    for name, value in response_headers(request_id, reply):
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
    if with_body:
        parts.append(reply.body)
    return b"".join(parts)


def encode_refusal(error: Refused, request_id: str) -> bytes:
    """Encode the response to input that never became a request, with the usual headers; the connection ends with it."""
    return encode_reply(refusal_reply(error), request_id, keep_alive=False)


@lru_cache(maxsize=1024)
def url_path(url: bytes) -> str:
    """Return the decoded path of a request's URL. Raises an error that httptools reports unless it is ASCII."""
    path: str = httptools.parse_url(url).path.decode("ascii")
    return unquote(path) if "%" in path else path


def without_upgrade(data: bytes) -> bytes:
    """Rename every `Upgrade` header, because httptools would take the following bytes for another protocol."""
    end = data.find(b"\r\n\r\n") + 2  # of the last header that is here
    return UPGRADE.sub(b"\r\nignored:", data[:end]) + data[end:] if UPGRADE.search(data, 0, end) else data
