"""What a server does with more connections than it takes. Probes and good requests go on through."""

import signal
from contextlib import ExitStack

from bounded import CONNECTIONS, GOOD, assert_right, server
from served import INFER, Reply, Served, eventually, http

from mpdsgr_deploy.serving.listener import RESERVE


def assert_nobody_else(server: Served) -> None:
    """Wait until the server has seen everybody leave; before, it may have no place for who asks."""
    assert eventually(lambda: server.get("/v2").status == 200)
    assert eventually(lambda: server.metrics()["mpdsgr_connections"] == 1)


def assert_too_many(reply: Reply) -> None:
    assert (reply.status, reply.headers.get("retry-after")) == (503, "1"), reply
    assert "too many connections" in reply.json()["error"]


def test_connections(server: Served) -> None:
    assert_nobody_else(server)
    with ExitStack() as stack:
        kept = [stack.enter_context(server.connect()) for _ in range(CONNECTIONS)]
        kept[0].send(http("GET", "/v2/health/live"))
        assert kept[0].reply().status == 200
        for refused in [stack.enter_context(server.connect()) for _ in range(5)]:
            assert_too_many(refused.reply())
            assert refused.closed()
        kept[-1].send(GOOD)
        assert_right(kept[-1].reply())
    assert_nobody_else(server)
    assert_right(server.ask(GOOD))


REFUSED = {  # by status
    400: b"no request\r\n\r\n",
    404: http("GET", "/nothing"),
    405: http("DELETE", INFER),
    413: http("POST", "/v2/repository/index", bytes(1 << 17)),
    415: http("POST", INFER, b"{}", {"Content-Encoding": "br"}),
    431: http("GET", "/v2", headers={"X": "x" * (1 << 17)}),
}


def test_refusals_have_the_same_headers_whoever_writes_them(server: Served) -> None:
    """Some are written before there is a request to answer."""
    with ExitStack() as stack:
        replies = {status: server.ask(request) for status, request in REFUSED.items()}
        for _ in range(CONNECTIONS):
            stack.enter_context(server.connect())
        replies[503] = server.ask(GOOD)
    assert {status: reply.status for status, reply in replies.items()} == {status: status for status in replies}
    for status, reply in replies.items():
        assert reply.headers["content-type"] == "application/json"
        assert (reply.headers["x-content-type-options"], list(reply.json())) == ("nosniff", ["error"])
        assert reply.headers["x-request-id"]
        assert reply.headers.get("allow") == ("POST" if status == 405 else None)
        assert reply.headers.get("retry-after") == ("1" if status == 503 else None)


def test_a_burst_of_connections_takes_the_places_that_are_free(server: Served) -> None:
    """Accepted all at once after a pause: each is judged by those before it, and who left in between is none."""
    assert_nobody_else(server)
    with ExitStack() as stack:
        server.signal(signal.SIGSTOP)
        try:
            server.connect().close()
            burst = [stack.enter_context(server.connect(5)) for _ in range(CONNECTIONS + 5)]
        finally:
            server.signal(signal.SIGCONT)
        for refused in burst[CONNECTIONS:]:
            assert_too_many(refused.reply())
        for connection in burst[:CONNECTIONS]:
            connection.send(GOOD)
            assert_right(connection.reply())
    assert_nobody_else(server)


def test_the_answer_to_a_connection_above_the_reserve_is_not_reset(server: Served) -> None:
    """Its request is there already: left unread, it would reset the connection and take the answer along."""
    assert_nobody_else(server)
    with ExitStack() as stack:
        server.signal(signal.SIGSTOP)
        try:
            for _ in range(CONNECTIONS + RESERVE):
                stack.enter_context(server.connect(5))
            refused = [stack.enter_context(server.connect(5)) for _ in range(3)]
            for connection in refused:
                connection.send(GOOD)
        finally:
            server.signal(signal.SIGCONT)
        for connection in refused:
            assert_too_many(connection.reply())
            assert connection.socket.recv(1) == b""
    assert_nobody_else(server)


def test_probes_of_health_have_a_way_in_of_their_own(server: Served) -> None:
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(server.connect()).send(GOOD[:-5])
        assert eventually(lambda: server.ask(GOOD).status == 503)
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert server.get(path).status == 200
    assert eventually(lambda: server.ask(GOOD).status == 200)
