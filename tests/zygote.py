"""A process that has imported what the commands import, and forks a child for each command it is asked to run.

Importing torch and Lightning takes seconds of processor time; so each command costs its own work alone. Who connects
to its socket sends a command as a line of JSON and gets its exit code. It ends with its stdin.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from importlib import import_module

PACKAGE = ("cli", "training", "exporting", "validation", "diagnostics.checkpoint", "runtime.torch_model")
MODULES = (*(f"mpdsgr_deploy.{name}" for name in PACKAGE), "sklearn.datasets")


def run(arguments: list[str], cwd: str, environment: dict[str, str], prelude: str, output: list[str]) -> None:
    """In a forked child: the command, as in a process of its own. prelude: code that is executed first."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, path in enumerate([os.devnull, *output]):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    exec(prelude, {})
    from mpdsgr_deploy.cli import main

    main(arguments, prog_name="mpdsgr")


def leave(status: object) -> None:
    """End as an interpreter does, but leave it to the kernel to free what was imported, which else takes seconds."""
    code = status if isinstance(status, int) else int(status is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer(connection: socket.socket) -> None:
    """In a forked child: have another one run the command, which may be killed, and send its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    job = json.loads(connection.makefile().readline())
    child = os.fork()
    if child == 0:
        connection.close()
        try:
            run(**job)
        except SystemExit as end:
            leave(end.code)
        leave(None)
    _, status = os.waitpid(child, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def reap(*_: object) -> None:
    """Wait for the children that have ended, so that their time is counted as this process's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def serve(listener: socket.socket) -> None:
    for name in MODULES:
        import_module(name)
    gc.freeze()  # a collection in a child would copy every page that holds an object
    signal.signal(signal.SIGCHLD, reap)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        with connection:
            if os.fork() == 0:
                listener.close()
                answer(connection)
                os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
