"""A server in a process of its own, and one that only holds the same opened network, to subtract."""

import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

SERVING = re.compile(r"serving on (http://[^,]+), gRPC on port (\d+)")
PATIENCE = 60.0  # seconds for a process to start, and to end
MOST_ERRORS = 100  # lines kept of a server's log
HOLD = """
import sys
from pathlib import Path
import numpy as np
from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.runtime import open_predictor
bundle = open_bundle(Path(sys.argv[1]))
with open_predictor(bundle) as predictor:
    print("ready", flush=True)
    images = np.random.default_rng(0).random((int(sys.argv[2]), *bundle.manifest.input_shape), np.float32)
    for _ in range(20):
        predictor(images)
    print("warm", flush=True)
    sys.stdin.read()
"""


@dataclass
class Process:
    """One that is ready. started: seconds until it was; errors: lines it logged above a warning; code: of its exit."""

    pid: int
    started: float
    url: str = ""
    grpc: str = ""
    errors: list[str] = field(default_factory=list)
    code: int | None = None

    def memory(self) -> int:
        """Resident bytes, of its children too."""
        status = [Path(f"/proc/{pid}/status").read_text() for pid in tree(self.pid)]
        return sum(1024 * int(kilobytes) for text in status for kilobytes in re.findall(r"VmRSS:\s+(\d+) kB", text))

    def clock(self) -> float:
        """Seconds on a clock that stands still while its main thread is ready to run and gets no CPU."""
        waited = int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1])  # nanoseconds
        return time.monotonic() - waited / 1e9

    def files(self) -> int:
        """Open descriptors, of its children too."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in tree(self.pid))


def stat(pid: int) -> list[str]:
    """/proc/PID/stat behind the command's name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children(parent: int) -> Iterator[int]:
    """Processes whose parent it is."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if int(stat(int(directory.name))[1]) == parent:
                yield int(directory.name)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended


def tree(pid: int) -> list[int]:
    """It and all that it started."""
    return [pid, *(below for child in children(pid) for below in tree(child))]


@contextmanager
def serving(*arguments: object, limits: Mapping[str, float] = MappingProxyType({})) -> Iterator[Process]:
    """`mpdsgr serve` with these arguments and limits on free ports of the loopback; ends with SIGTERM."""
    command = [sys.executable, "-m", "mpdsgr_deploy", "serve", *map(str, arguments), "--port", "0", "--grpc-port", "0"]
    for key, value in {"grace_seconds": 0, **limits}.items():
        command += ["--set", f"limits.{key}={value}"]
    started = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        tail: deque[str] = deque(maxlen=20)
        while (found := SERVING.search(tail[-1] if tail else "")) is None:
            line = process.stderr.readline()
            if not line:
                sys.exit("error: the server does not start:\n" + "".join(tail))
            tail.append(line)
        running = Process(process.pid, time.monotonic() - started, found[1], f"127.0.0.1:{found[2]}")
        listener = threading.Thread(target=_listen, args=(process.stderr, running.errors))  # or the pipe fills
        listener.start()
        try:
            yield running
        finally:
            process.terminate()
            try:
                running.code = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            listener.join()


def _listen(lines: Iterable[str], errors: list[str]) -> None:
    for line in lines:
        if '"level": "info"' in line or '"level": "warning"' in line or len(errors) >= MOST_ERRORS:
            continue
        errors.append(line.strip()[:1000])


@contextmanager
def holding(bundle: Path, batch: int) -> Iterator[Process]:
    """A process that has opened the bundle's network, and computed batches of so many images, nothing else."""
    command = [sys.executable, "-c", HOLD, str(bundle), str(batch)]
    started = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        line = process.stdout.readline()
        ready = time.monotonic() - started
        if line != "ready\n" or process.stdout.readline() != "warm\n":
            sys.exit("error: the network cannot be opened")
        yield Process(process.pid, ready)
        process.stdin.close()
