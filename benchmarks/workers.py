"""Other libraries' VGG11, and ours, each in a process of its own: `peers/worker.py` with the same threads and malloc.

The peers live in an environment of their own under runs/, which the first call makes; it shares this one's torch.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import click
import harness

ENVIRONMENT = harness.FOLDER.parent / "runs" / "peers"
# packages that they need beside this environment; their own requirements would install another torch
PACKAGES = (
    *("spikingjelly==2.0.0", "loguru<1,>=0.7", "h5py", "requests", "SciencePlots"),
    *("snntorch==1.0.0", "torchattacks==3.5.1"),
)
VERSIONS = dict(package.split("==") for package in PACKAGES if "==" in package)
# glibc gives freed pages back to the kernel and asks for them again in the next step, unless it is told to keep them
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


class Worker:
    """An implementation in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __call__(self, task: str, batch: int, precision: str) -> dict[str, float]:
        """Seconds and bytes of one task."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(task, batch, precision, file=self._process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def worker(name: str, width: float, T: int, threads: int, accelerator: str) -> Iterator[Worker]:
    """Start it; it ends with the block."""
    python = Path(sys.executable) if name == "ours" else python_of_peers()
    script = harness.FOLDER / "peers" / "worker.py"
    command = [python, script, *map(str, (name, width, T, threads, accelerator))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **MALLOC}, **pipes) as process:
        if process.stdout.readline() != "ready\n":
            sys.exit(f"error: {name} does not run; remove {ENVIRONMENT} and try again")
        yield Worker(process)
        process.stdin.close()


def python_of_peers() -> Path:
    """Return the interpreter that imports the peers: this one if it can, else that of their environment."""
    here = all(map(find_spec, ("spikingjelly", "torchattacks")))  # a machine without a network
    return Path(sys.executable) if here else environment() / "bin" / "python"


def environment() -> Path:
    """The peers' environment, made where there is none."""
    if not (ENVIRONMENT / "complete").exists():
        click.echo(f"making {ENVIRONMENT} ...")
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        inside = ENVIRONMENT / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (inside / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        python = ENVIRONMENT / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
        (ENVIRONMENT / "complete").touch()
    return ENVIRONMENT
