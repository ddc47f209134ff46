"""Files that a test run makes once, by whichever process needs them first."""

import fcntl
from collections.abc import Callable
from pathlib import Path


def make_once(base: Path, name: str, make: Callable[[Path], object]) -> Path:
    """A file or folder that `make` writes once under `base`, shared by all processes: not to be written to."""
    common = base / "common"
    common.mkdir(exist_ok=True)
    with (common / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, also when `make` fails
        if not (common / name).exists():
            make(common / f"{name}.new")
            (common / f"{name}.new").rename(common / name)
    return common / name
