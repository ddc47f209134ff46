"""A listening socket that is about to be closed loses no connection that the system has accepted."""

import socket
import sys
from collections.abc import Iterator

import pytest

from mpdsgr_deploy.serving.last_connections import take_no_more


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=8) as sock:
        yield sock


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can ignore requests for connections")
def test_connections_of_before_are_accepted_and_later_ones_refused(listening: socket.socket) -> None:
    address = listening.getsockname()
    with socket.create_connection(address) as first, socket.create_connection(address) as second:
        take_no_more(listening)
        with pytest.raises(TimeoutError):
            socket.create_connection(address, timeout=0.2)
        for client in (first, second):
            client.sendall(b"question")
            accepted, _ = listening.accept()
            with accepted:
                assert accepted.recv(8) == b"question"
        listening.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)


def test_another_system_shortens_the_backlog(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    take_no_more(listening)
    with socket.create_connection(listening.getsockname(), timeout=5):
        listening.accept()[0].close()
