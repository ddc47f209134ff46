"""A process that has imported what the commands import, and forks a child for each command it is asked to run.

Importing torch and Lightning takes seconds of processor time; so each command costs its own work alone. Who connects
to its socket (`ask`) sends a command as a line of JSON and gets its exit code. It ends with its stdin. Servers have a
process of their own (`Forked`), without torch. With pytest-xdist it is itself the fork of a process that imports what
the tests import as well, and forks the workers (`forked_worker`).
"""

import atexit
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
from forked_worker import become, collect

BASE = "MPDSGR_TEST_BASE"  # the environment variable with the folder of what all processes share
PACKAGE = ("cli", "training", "exporting", "validation", "diagnostics.checkpoint_plots", "runtime.torch_model")
ADDRESS = "MPDSGR_TEST_ZYGOTE"  # the environment variable with the address of the socket
SERVERS = f"{ADDRESS}_OF_SERVERS"  # that of the process that forks servers
WORKERS = f"{ADDRESS}_OF_WORKERS"  # and that of the one that forks pytest's workers
MODULES = {
    ADDRESS: [*(f"mpdsgr_deploy.{name}" for name in PACKAGE), "exporting_once"],
    SERVERS: ["mpdsgr_deploy.cli.serve", "mpdsgr_deploy.serving.server", "onnxruntime"],
    WORKERS: [],
}
IMPORTED_FROM = os.environ.get("PYTHONPATH")


def read_at_start() -> dict[str, str]:
    """The variables of this process's environment that decide how a program is loaded and what its imports are."""
    prefixes = ("PYTHON", "LD_", "MALLOC_", "OMP_")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


READ_AT_START = read_at_start()


def start(*kinds: str, tests: Sequence[str] = ()) -> None:
    """Start a process that forks what these kinds are, for the tests of all workers; it ends with the first process.

    Each kind is forked from what it and the kinds before it import. tests: pytest's arguments, for WORKERS.
    """
    descriptors = {}
    with ExitStack() as listeners:
        for kind in kinds:
            os.environ[kind] = str(Path(mkdtemp()) / "zygote")
            atexit.register(shutil.rmtree, Path(os.environ[kind]).parent)
            listener = listeners.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(os.environ[kind])
            listener.listen()
            descriptors[kind] = listener.fileno()
        command = [sys.executable, __file__, json.dumps(descriptors), *tests]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=descriptors.values())
    atexit.register(process.communicate)  # closes its stdin, at which it ends


def address(kind: str = ADDRESS) -> str:
    """The socket of the process that forks this kind, which is started unless there is one."""
    if kind not in os.environ:
        start(kind)
    return os.environ[kind]


def ask(
    words: list[str], cwd: Path, environment: dict[str, str], prelude: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command with these words in a process of its own. prelude: code that this process executes first."""
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
        output = [Path(folder) / name for name in ("stdout", "stderr")]
        job = {"arguments": words, "cwd": str(cwd), "environment": environment, "prelude": prelude}
        connection.connect(address())
        connection.sendall((json.dumps({**job, "output": [*map(str, output)]}) + "\n").encode())
        code = int(connection.makefile().readline())
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in output))


def ask_command(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """In place of `subprocess.run(command, check=True)`, where a command of ours runs another one."""
    if os.environ.get("PYTHONPATH") != IMPORTED_FROM:  # a path decides what is imported
        return subprocess.run(command, **options)
    done = ask(command[3:], Path.cwd(), dict(os.environ))  # behind "python -m mpdsgr_deploy"
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr.encode())
    return done


ASKING = SimpleNamespace(run=ask_command, DEVNULL=subprocess.DEVNULL, CalledProcessError=subprocess.CalledProcessError)
"""In place of the module `subprocess`."""


class Forked:
    """`mpdsgr` with these words in a process that was forked: what tests use of `subprocess.Popen`, stderr a pipe.

    Its environment is this process's with `environment`; prelude: code that it executes first.
    """

    def __init__(self, words: list[str], environment: dict[str, str], prelude: str = "") -> None:
        self.args, self.returncode = words, None
        reading, writing = os.pipe()
        job = {
            "arguments": words,
            "cwd": str(Path.cwd()),
            "environment": {**os.environ, **environment},
            "prelude": prelude,
            "output": [os.devnull, f"/proc/{os.getpid()}/fd/{writing}"],
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        }
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address(SERVERS))
        self._connection.sendall((json.dumps(job) + "\n").encode())
        self._answers = self._connection.makefile("rb", buffering=0)  # no answer waits where `select` does not see it
        self.pid = int(self._answers.readline())
        os.close(writing)
        self.stderr = os.fdopen(reading)

    returncode: int | None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, how: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, how)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def redirect(output: list[str]) -> None:
    """In a forked child: stdin from nothing, stdout and stderr into these files."""
    for descriptor, path in enumerate([os.devnull, *output]):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)


def run(arguments: list[str], cwd: str, environment: dict[str, str], prelude: str) -> None:
    """In a forked child: the command, as in a process of its own. prelude: code that is executed first."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if (once := sys.modules.get("exporting_once")) and BASE in environment:
        once.use(pytest.MonkeyPatch(), Path(environment[BASE]))
    exec(prelude, {})
    from mpdsgr_deploy.cli import main

    if target := sys.modules.get("mpdsgr_deploy.validation.target"):
        vars(target)["subprocess"] = ASKING
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
    """In a forked child: run the command. Where its job names a limit of open files, send this process's id first."""
    job = json.loads(connection.makefile().readline())
    redirect(job.pop("output"))
    if open_files := job.pop("open_files", None):
        resource.setrlimit(resource.RLIMIT_NOFILE, open_files)
        connection.sendall(f"{os.getpid()}\n".encode())
    connection.close()
    run(**job)


def serve(listener: socket.socket, answer: Callable[[socket.socket], None]) -> None:
    """Fork a child for each that connects, which gets its exit code, until stdin is closed."""
    children: dict[int, tuple[int, socket.socket]] = {}  # by descriptor: process ids, and who waits for them
    gc.freeze()  # a collection in a child would copy every page that holds an object
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a keyboard interrupt ends the first process, and so this one
    while sys.stdin not in (ready := select.select([listener, sys.stdin, *children], [], [])[0]):
        for descriptor in children.keys() & ready:
            report(descriptor, *children.pop(descriptor))
        if listener in ready:
            connection, _ = listener.accept()
            child = os.fork()
            if child == 0:
                for opened in (listener, *(other for _, other in children.values())):
                    opened.close()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                try:
                    answer(connection)
                except SystemExit as end:
                    leave(end.code)
                leave(None)
            children[os.pidfd_open(child)] = child, connection
    with suppress(ChildProcessError):
        while os.wait():  # so that their time is counted as this process's
            pass


def report(descriptor: int, child: int, connection: socket.socket) -> None:
    """Send the exit code of a child that has ended, unless nobody waits for it any more."""
    os.close(descriptor)
    _, status = os.waitpid(child, 0)
    with connection, suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main(descriptors: dict[str, int], tests: list[str]) -> None:
    *others, _ = descriptors
    for kind, descriptor in descriptors.items():
        for name in MODULES[kind]:
            import_module(name)
        if kind == ADDRESS:
            import_module("quick_tiers").use()
        listener = socket.socket(fileno=descriptor)
        if kind in others and os.fork():
            listener.close()
        elif kind == WORKERS:
            collect(tests)
            serve(listener, become)
        else:
            return serve(listener, answer)
    return None


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as `serve` has it, before the import
    main(json.loads(sys.argv[1]), sys.argv[2:])
