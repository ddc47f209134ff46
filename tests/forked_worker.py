"""pytest-xdist's workers as forks of one process, which has collected the tests and so imported all that they import.

As a program this is what xdist starts for each worker in place of a Python interpreter: it hands what it was given to a
fork of that process, and ends with it.
"""

import json
import os
import signal
import socket
import sys
from types import ModuleType


def hand_over(address: str, code: str) -> None:
    """Have a fork execute the code with the stdin, stdout, stderr, environment and folder of this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fork gets it, too
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        job = {"code": code, "cwd": os.getcwd(), "environment": dict(os.environ)}
        connection.sendall((json.dumps(job) + "\n").encode())
        connection.recv(1)  # once the fork has ended


def collect(arguments: list[str]) -> None:
    """Import what the tests import. Errors are the workers' to report: each collects the tests again."""
    import pytest

    pytest.main(["--collect-only", "-p", "no:terminal", *arguments])


def become(connection: socket.socket) -> None:
    """In a fork: what `hand_over` asks for."""
    _, files, *_ = socket.recv_fds(connection, 1, 3)
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    job = json.loads(connection.makefile().readline())
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.modules["__main__"] = ModuleType("__main__")  # which `python -c` has, too
    exec(job["code"], vars(sys.modules["__main__"]))


if __name__ == "__main__":
    hand_over(sys.argv[1], sys.argv[-1])  # between them are options of Python
