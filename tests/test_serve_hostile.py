"""Bad requests over HTTP against a real server: one exact status each, a good answer behind each, nothing left over."""

import json
import socket
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from hostile_heads import POST, WIRE, head
from hostile_requests import CONTENT, GOOD, MOST, PACKED, TENSOR, TEXT, MiB, X, chunked, post
from hypothesis import given, settings
from hypothesis import strategies as st
from served import BUNDLE, INFER, Reply, Served, eventually, http, images, request

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.runtime import open_predictor


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with Served(limits={"batch": MOST, "in_flight_bytes": MiB}) as served:
        for _ in range(50):  # what is allocated once
            assert_serves(served)
        served.get("/metrics")
        files, memory = served.descriptors(), served.rss()
        yield served
        assert served.alive
        assert not [line for line in served.lines if line["level"] in ("error", "critical", "")]
        codes = {key.partition('code="')[2][:3] for key in served.metrics() if "requests_total" in key}
        assert not {code for code in codes if code[0] == "5"} - {"503"}  # a connection with too many requests
        assert served.metrics()["mpdsgr_in_flight_bytes"] == 0
        assert eventually(lambda: served.descriptors() <= files + 2)
        assert served.rss() <= memory + 16 * MiB


@cache
def expected(pixels: bytes) -> np.ndarray:
    """What the network gives in this process."""
    with open_predictor(open_bundle(BUNDLE)) as predictor:
        return predictor(np.frombuffer(pixels, "<f4").reshape(-1, 1, 8, 8))


def assert_right(reply: Reply, x: np.ndarray = X) -> None:
    assert reply.status == 200, reply.body
    np.testing.assert_allclose(reply.output(), expected(x.tobytes()), atol=1e-5)


def assert_serves(server: Served) -> None:
    assert_right(server.post(INFER, GOOD))


@pytest.mark.parametrize("name", CONTENT)
def test_a_bad_request_is_refused(server: Served, name: str) -> None:
    data, status, part = CONTENT[name]
    reply = server.ask(data)
    assert reply.status == status, reply.body
    assert part in reply.json()["error"]
    assert len(reply.body) < 1000
    assert_serves(server)


def test_a_gigabyte_in_a_megabyte_is_not_inflated(server: Served) -> None:
    """One deflate block of a million zeros a thousand times over, in chunks: no Content-Length that would tell."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    first = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    before = server.rss()
    reply = server.ask(chunked(first, *[block] * 1000, Content_Encoding="gzip"))
    assert reply.status == 413
    assert server.rss() - before < 4 * MiB
    assert_serves(server)


def test_what_comes_compressed_or_in_pieces_is_read(server: Served) -> None:
    for encoding, content in (("gzip", PACKED), ("GZIP", PACKED), ("deflate", zlib.compress(TEXT)), ("identity", TEXT)):
        assert_right(server.ask(post(content, Content_Encoding=encoding)))
        pieces = [content[i : i + 100] for i in range(0, len(content), 100)]
        assert_right(server.ask(chunked(*pieces, Content_Encoding=encoding)))


@pytest.mark.parametrize("name", WIRE)
def test_what_is_no_request_of_ours_is_refused(server: Served, name: str) -> None:
    data, status, part = WIRE[name]
    reply = server.ask(data)
    assert reply.status == status, reply.body
    assert part in reply.json()["error"]
    assert len(reply.body) < 1000
    assert "set-cookie" not in reply.headers
    assert_serves(server)


@pytest.mark.parametrize("path", ["/v2", "/v2/models/bundle", "/", "/metrics", INFER])
def test_a_head_has_no_body(server: Served, path: str) -> None:
    with server.connect() as connection:
        connection.send(http("HEAD", path) + http("GET", "/v2/health/live"))
        assert connection.reply(head=True).status == (405 if path == INFER else 200)
        assert connection.reply().json() == {"live": True}


@pytest.mark.parametrize("given", ["a\tb", "a\x85b", "x" * 129, "", "\xa0"])
def test_request_ids_that_are_not_taken(server: Served, given: str) -> None:
    told = server.ask(http("GET", "/v2", headers={"X-Request-Id": given})).headers["x-request-id"]
    assert told != given
    assert told.isascii()


def test_a_body_is_asked_for(server: Served) -> None:
    headers = {"Content-Length": len(TEXT), "Expect": "100-continue"}
    with server.connect() as connection:
        connection.send(http("POST", INFER, b"", headers))
        assert connection.reply().status == 100
        connection.send(TEXT)
        assert_right(connection.reply())
        connection.send(http("POST", INFER, b"", headers | {"Content-Length": 10**9}))
        assert connection.reply().status == 413  # and not sent for nothing


UPGRADES = {
    "h2c": ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"),
    "websocket": ("Connection: Upgrade", "UPGRADE: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: YQ=="),
}


@pytest.mark.parametrize("kind", UPGRADES)
def test_an_offer_of_another_protocol_is_passed_over(server: Served, kind: str) -> None:
    """With a body too, which Java's client sends so."""
    with server.connect() as connection:
        for _ in range(2):
            connection.send(head(POST, *UPGRADES[kind], f"Content-Length: {len(TEXT)}") + TEXT)
            assert_right(connection.reply())


@pytest.mark.parametrize("kind", UPGRADES)
def test_a_body_behind_an_offer_is_never_a_request(server: Served, kind: str) -> None:
    """The offer in two pieces, where it reaches the parser, which would end the request at its head."""
    inner = http("GET", "/v2/health/live")
    outer = head(POST, *UPGRADES[kind], f"Content-Length: {len(inner)}") + inner
    place = outer.lower().index(b"upgrade: ") + 3
    with server.connect() as connection:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.send(outer[:place])
        assert server.get("/v2").status == 200  # the first piece was read
        connection.send(outer[place:])
        assert connection.reply().status == 400
        assert connection.closed()
    assert_serves(server)


def test_answers_come_in_the_order_of_the_requests(server: Served) -> None:
    many = [images(n + 1, seed=n) for n in range(6)]
    with server.connect() as connection:
        connection.send(b"".join(post(request(x)) + post(b"{") + http("GET", "/nope") for x in many))
        for x in many:
            assert_right(connection.reply(), x)
            assert connection.reply().status == 400
            assert connection.reply().status == 404


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (head("GET /v2 HTTP/1.1", "A: " + "a" * 70_000), 431),
        (head(POST, "Transfer-Encoding: chunked") + b"zz\r\n", 400),
    ],
)
def test_no_request_takes_the_answer_of_another(server: Served, bad: bytes, status: int) -> None:
    """What is broken behind good requests is answered last, and what follows it not at all."""
    with server.connect() as connection:
        connection.send(post(GOOD) * 3 + bad + post(GOOD))
        for _ in range(3):
            assert_right(connection.reply())
        assert connection.reply().status == status
        assert connection.closed()
    assert_serves(server)


def test_a_connection_cannot_queue_requests_without_end(server: Served) -> None:
    one = http("GET", "/v2/health/live")
    before = server.rss()
    with server.connect(30) as connection:
        connection.send(one * 200_000)
        replies = 0
        try:
            while connection.reply().status == 200:
                replies += 1
        except ConnectionError:
            pass
    assert replies < 200_000  # of those sent before the end, the client's system drops what was not read by then
    assert server.rss() - before < 8 * MiB
    assert_serves(server)


def test_clients_that_leave(server: Served) -> None:
    whole = post(GOOD)
    for n in range(0, len(whole), 40):
        with server.connect() as connection:
            connection.send(whole[:n])
    for how in (socket.SHUT_WR, socket.SHUT_RDWR):
        with server.connect() as connection:
            connection.send(whole)
            connection.socket.shutdown(how)
    assert_serves(server)
    assert eventually(lambda: server.metrics()["mpdsgr_connections"] == 1)  # the one that asks


KEYS = st.sampled_from(["id", "name", "shape", "datatype", "data", "inputs", "outputs", "parameters", "timeout"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(key=KEYS, value=VALUES, place=st.sampled_from(["request", "input", "output"]))
def test_any_value_anywhere(server: Served, key: str, value: Any, place: str) -> None:
    """A 200 only for what means the good request still."""
    changed = {
        "request": {**GOOD, key: value},
        "input": {**GOOD, "inputs": [{**TENSOR, key: value}]},
        "output": {**GOOD, "outputs": [{"name": "logits", key: value}]},
    }[place]
    reply = server.post(INFER, changed)
    assert reply.status in (200, 400), reply
    if reply.status == 200:
        assert_right(reply)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(place=st.integers(0, len(TEXT) - 1), byte=st.integers(0, 255))
def test_any_byte_anywhere(server: Served, place: int, byte: int) -> None:
    """A changed digit is another image, and has that image's logits."""
    content = TEXT[:place] + bytes([byte]) + TEXT[place + 1 :]
    reply = server.ask(post(content))
    assert reply.status in (200, 400), reply
    if reply.status == 200:
        (told,) = json.loads(content)["inputs"]
        assert_right(reply, np.array(told["data"], np.float32))
