"""Ports for servers of tests that must know theirs before they start."""

import random
import socket
from contextlib import suppress


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, and that neither Linux nor Ray hands out to whoever asks for any port."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 30000)
        with suppress(OSError), socket.create_server(("", port)):
            ports += [port] if port not in ports else []
    return ports
