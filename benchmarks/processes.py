"""A server in a process of its own, and one that only holds the same opened network, to subtract."""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVING = re.compile(r"serving on (http://[^,]+), gRPC on port (\d+)")
PATIENCE = 60.0  # seconds for a process to start, and to end
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


@dataclass(frozen=True)
class Process:
    """One that is ready. started: seconds until it was."""

    pid: int
    started: float
    url: str = ""
    grpc: str = ""
    log: Path = Path()

    def memory(self) -> int:
        """Resident bytes."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    def files(self) -> int:
        """Open descriptors."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def errors(self) -> list[str]:
        """What it logged as worse than a warning."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line["message"] for line in lines if line.get("level") in ("error", "critical")]


@contextmanager
def serving(*arguments: object) -> Iterator[Process]:
    """`mpdsgr serve` with these arguments on free ports of the loopback; ends with SIGTERM."""
    command = [sys.executable, "-m", "mpdsgr_deploy", "serve", *map(str, arguments), "--port", "0", "--grpc-port", "0"]
    command += ["--set", "limits.grace_seconds=0"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        started = time.monotonic()
        with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
            try:
                while (found := SERVING.search(log.read_text())) is None:
                    if process.poll() is not None or time.monotonic() - started > PATIENCE:
                        sys.exit(f"error: the server does not start: {log.read_text()[-2000:]}")
                    time.sleep(0.002)
                yield Process(process.pid, time.monotonic() - started, found[1], f"127.0.0.1:{found[2]}", log)
            finally:
                process.terminate()
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()


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
