"""Where a result comes from: software versions, hardware, source revision, time."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "torch", "torchvision", "lightning-fabric", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def provenance() -> dict[str, Any]:
    """Return a JSON-ready record of time, versions, source revision and hardware, without importing packages for it."""
    from mpdsgr_deploy import __version__

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mpdsgr_deploy": __version__,
        "revision": source_revision(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "platform": platform.platform(terse=True),
        "hardware": hardware(),
    }


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def source_revision() -> str | None:
    """Return the git commit from which this package runs; None outside a checkout.

    "+dirty" follows if the package's files differ from the commit. The result of the first call is kept, because code
    that is imported does not change with the files.
    """
    source = Path(__file__).parent
    if not (source.parent / ".git").exists():
        return None
    try:
        head = _git(source, "rev-parse", "HEAD")
        return head + ("+dirty" if _git(source, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def hardware() -> dict[str, Any]:
    """Return the CPU's name, the number of usable cores, and the names of GPUs if torch is loaded and sees any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {"cpu": _cpu_name(), "cores": cores}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return machine


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
