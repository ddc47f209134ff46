"""The Open Inference Protocol over HTTP: answers to requests, independent of how head and body arrive."""

import asyncio
import json
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.inference_protocol import HEADER
from mpdsgr_deploy.serving import logs, metrics
from mpdsgr_deploy.serving.app import Server, Share
from mpdsgr_deploy.serving.http_timer import client_time
from mpdsgr_deploy.serving.inference import infer
from mpdsgr_deploy.serving.refusals import RETRY_AFTER, Refused, Why, internal, invalid
from mpdsgr_deploy.serving.requests import members, parse_json, parse_request, response
from mpdsgr_deploy.serving.security import check_caller
from mpdsgr_deploy.serving.served_model import ServedModel
from mpdsgr_deploy.serving.tensors import JSON_ENVELOPE, too_large
from mpdsgr_deploy.serving.web_page import page

JSON, BINARY = b"application/json", b"application/octet-stream"
PLAIN, HTML = b"text/plain; version=0.0.4", b"text/html; charset=utf-8"
OPEN = {"/", "/v2/health/live", "/v2/health/ready"}  # paths that need no key


class Body(Protocol):
    """The body of a request, which is read as it arrives."""

    complete: bool  # the whole body has arrived

    @property
    def at_end(self) -> bool:
        """Whether all of the body was read."""

    async def read(self) -> bytes:
        """Return the next part. Raises Refused if the client disconnects first."""

    def watch(self, on_disconnect: Callable[[], None] | None) -> None:
        """Call a function when the client disconnects, or now if it has already; None: call nothing any more."""


class Reply(NamedTuple):
    """A response. kind: its Content-Type; headers: those in addition to `response_headers`."""

    status: int
    body: bytes
    kind: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(slots=True, eq=False)
class Exchange:
    """One request, as a `RequestLog`: its head, its body, and the model it reached, if any.

    headers: by name in lower case. client: returns the client's address. start: on the monotonic clock.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Body
    client: Callable[[], str]
    start: float = field(default_factory=time.monotonic)
    id: str = ""
    share: Share = field(init=False)
    model: ServedModel | None = None
    images: int = 0

    @property
    def peer(self) -> str:
        return self.client()


class Http:
    """Answers HTTP requests to a server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def answer(self, exchange: Exchange) -> Reply:
        """Return the response to a request, which is counted and logged; errors become refusals."""
        server = self.server
        exchange.id = exchange.headers.get("x-request-id", "")
        if not (exchange.id.isprintable() and 0 < len(exchange.id) <= 128):
            exchange.id = server.new_id()
        refused = None
        server.counts.requests += 1
        with server.memory.share() as share:
            exchange.share = share
            try:
                reply = await self._reply(exchange)
            except Refused as error:
                refused, reply = error.without_frames(), refusal_reply(error)
            except Exception as error:
                log.exception("request %s failed", exchange.id)
                refused = internal(error)
                reply = refusal_reply(refused)
            finally:
                server.counts.requests -= 1
        server.count("http", exchange, str(reply.status), refused)
        return reply

    async def _reply(self, exchange: Exchange) -> Reply:
        path, method = exchange.path.rstrip("/") or "/", exchange.method
        if path not in OPEN:
            self.server.authorize(exchange.headers.get("authorization", ""))
            if self.server.local:
                check_caller(exchange.headers.get("host", ""), exchange.headers.get("origin"))
        parts = path.split("/")[1:]
        if parts[:2] == ["v2", "models"] and len(parts) > 2 and parts[2] != "stats":
            return await self._model(exchange, parts[2:])
        if parts[:2] == ["v2", "repository"]:
            return await self._repository(exchange, parts[2:])
        gets: dict[str, Callable[[], Reply]] = {
            "/": _page,
            "/v2": lambda: _json(self.server.metadata()),
            "/v2/health/live": lambda: _json({"live": True}),
            "/v2/health/ready": self._ready,
        }
        if path == "/metrics":
            _require(method, "GET")
            return Reply(200, await metrics.text(self.server), PLAIN)
        of_all_processes = {"/status": self.server.status, "/v2/models/stats": self.server.statistics}
        if path in of_all_processes:
            _require(method, "GET")
            return _json(await of_all_processes[path]())
        if path not in gets:
            raise Refused(Why.NOT_FOUND, f"there is no {path[:100]}")
        _require(method, "GET")
        return gets[path]()

    def _ready(self) -> Reply:
        if self.server.ready:
            return _json({"ready": True})
        return Reply(503, json.dumps({"ready": False}).encode(), headers=((b"retry-after", RETRY_AFTER.encode()),))

    async def _model(self, exchange: Exchange, parts: list[str]) -> Reply:
        """Answer a request about a model. parts: the parts of the path, from the model's name on."""
        name, version, action = parts[0], "", parts[1:]
        if action[:1] == ["versions"] and len(action) > 1:
            version, action = action[1], action[2:]
        action_name = "/".join(action)
        if action_name == "infer":
            _require(exchange.method, "POST")
            return await self._infer(exchange, name, version)
        if action_name not in ("", "ready", "config", "stats"):
            raise Refused(Why.NOT_FOUND, f"a model has no {action_name[:100]!r}")
        _require(exchange.method, "GET")
        if action_name == "stats":
            return _json(await self.server.statistics(name, version))
        model = self.server.repository.model(name, version)
        if action_name == "ready":
            return _json({"name": name, "ready": True})
        return _json(model.config() if action_name == "config" else model.metadata())

    async def _infer(self, exchange: Exchange, name: str, version: str) -> Reply:
        limits, repository = self.server.limits, self.server.repository
        model = exchange.model = repository.model(name, version)
        body = await self._body(exchange, model.input.body_bytes)
        # a newer version may have replaced it while the body arrived
        model = exchange.model = repository.model(name, version)
        request = parse_request(body, exchange.headers.get(HEADER.lower()), model.input)
        with logs.span(exchange.headers, model, exchange.id):
            answers = await infer(model, self.server.batcher, request, limits.request_seconds, exchange.body.watch)
        head, binary = response(model, request, answers)
        exchange.images = answers[0].shape[0]
        if not binary:
            return Reply(200, head)
        return Reply(200, head + binary, BINARY, ((HEADER.encode(), str(len(head)).encode()),))

    async def _repository(self, exchange: Exchange, parts: list[str]) -> Reply:
        _require(exchange.method, "POST")
        body = await self._body(exchange, JSON_ENVELOPE)
        content = parse_json(body) if body else {}
        if parts == ["index"]:
            return _json(self.server.index(ready=content.get("ready") is True))
        if len(parts) != 3 or parts[0] != "models" or parts[2] not in ("load", "unload"):
            raise Refused(Why.NOT_FOUND, f"there is no {exchange.path[:100]}")
        self.server.require_control()
        if members(content.get("parameters", {}), "parameters") not in (
            {},
            {"unload_dependents": False},
            {"unload_dependents": True},
        ):
            raise invalid(
                "parameters are not supported, because models are loaded from the server's own bundles; leave them out"
            )
        repository = self.server.repository
        await (repository.load if parts[2] == "load" else repository.unload)(parts[1])
        return Reply(200, b"")

    async def _body(self, exchange: Exchange, most: int) -> bytes:
        """Return the whole body, decompressed. Raises Refused for one of more than `most` bytes, late or invalid."""
        most = min(most, self.server.memory.limit)
        length = exchange.headers.get("content-length")
        if length is not None and int(length) > most:  # listeners refuse a length that is not a number
            raise too_large(most)
        inflate = _inflater(exchange.headers.get("content-encoding"))
        if inflate is None and exchange.body.at_end:
            return b""
        if exchange.body.complete:
            return await _read(exchange, most, inflate)
        try:
            async with asyncio.timeout(None) as timeout:
                with client_time(timeout, self.server.limits.body_seconds):
                    return await _read(exchange, most, inflate)
        except TimeoutError:
            seconds = self.server.limits.body_seconds
            raise Refused(Why.SLOW, f"the body did not arrive within {seconds:g} s") from None


def _inflater(encoding: str | None) -> "zlib._Decompress | None":
    kind = (encoding or "identity").lower()
    if kind == "identity":
        return None
    if kind not in ("gzip", "deflate"):
        raise Refused(Why.ENCODING, f"Content-Encoding {kind[:40]!r} is not supported; use gzip or deflate")
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # accepts both gzip and zlib headers


async def _read(exchange: Exchange, most: int, inflate: "zlib._Decompress | None") -> bytes:
    parts: list[bytes] = []
    sent = size = 0  # bytes received, and bytes after decompression
    while not exchange.body.at_end:
        part = await exchange.body.read()
        sent += len(part)
        if inflate is not None:
            # decompress no more than it takes to see that the body is too large
            part = _inflated(inflate, part, most - size + 1)
        size += len(part)
        if max(sent, size) > most:  # compressed data can be larger than their content, which may even be empty
            raise too_large(most)
        exchange.share.take(len(part))
        parts.append(part)
    if inflate is not None and not inflate.eof:
        raise invalid("the compressed body ends too early")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _inflated(inflate: "zlib._Decompress", part: bytes, most: int) -> bytes:
    try:
        inflated = inflate.decompress(part, most)
    except zlib.error as error:
        raise invalid(f"the body is not compressed as its header states: {error}") from None
    if inflate.unused_data:
        raise invalid("there are bytes after the end of the compressed body")
    return inflated


def _require(method: str, allowed: str) -> None:
    if method != allowed and not (method == "HEAD" and allowed == "GET"):
        raise Refused(
            Why.METHOD, f"this address does not accept {method[:20]}; use {allowed}", headers={"allow": allowed}
        )


def _json(content: Any) -> Reply:
    return Reply(200, json.dumps(content).encode())


def _page() -> Reply:
    content, policy = page()
    return Reply(200, content, HTML, ((b"content-security-policy", policy), (b"cache-control", b"no-cache")))


def refusal_reply(error: Refused) -> Reply:
    headers = tuple((name.encode(), value.encode()) for name, value in error.headers.items())
    return Reply(error.why.status, json.dumps({"error": str(error)}).encode(), headers=headers)


def response_headers(request_id: str, reply: Reply) -> list[tuple[bytes, bytes]]:
    """Return the headers of a response, except for `connection`."""
    return [
        (b"content-type", reply.kind),
        (b"content-length", str(len(reply.body)).encode()),
        (b"x-request-id", request_id.encode("latin-1")),
        (b"x-content-type-options", b"nosniff"),
        *reply.headers,
    ]
