"""What Windows lacks is stood in for: the torch-free commands work without POSIX's modules."""

import ast
import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mpdsgr_deploy
from mpdsgr_deploy import locks
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.recipe import Data

ABSENT = {"fcntl", "resource", "uvloop", "pwd", "grp", "termios"}  # on Windows

# Imports of these modules fail; msvcrt is one that records its calls; files that are open can neither be removed nor
# replaced. posixpath and the file system's other ways stay, so this shows what is imported and called, not all of how
# Windows behaves.
STAND_IN = f"""
import os, signal, subprocess, sys, types
for name in {ABSENT}:
    sys.modules[name] = None

def refusing(call):
    def checked(*paths, **options):
        for path in map(os.path.realpath, paths):
            for descriptor in os.listdir("/proc/self/fd"):
                if os.path.isfile(path) and os.path.realpath("/proc/self/fd/" + descriptor) == path:
                    raise PermissionError(13, "it is being used by another process", path)
        return call(*paths, **options)
    return checked

for name in ("unlink", "remove", "rename", "replace"):
    setattr(os, name, refusing(getattr(os, name)))
locks = []
msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_LOCK, msvcrt.LK_NBLCK = 1, 2
msvcrt.locking = lambda descriptor, mode, size: locks.append((mode, size))
sys.modules["msvcrt"] = msvcrt
del signal.pthread_sigmask
from mpdsgr_deploy.cli import main
try:
    main(sys.argv[1:])
finally:
    print("locks", locks, file=sys.stderr)
"""


def on_windows(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STAND_IN, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


def test_help_works() -> None:
    done = on_windows("--help")
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_predict_works_and_locks(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", load_test(Data(name="digits")).pixels[:3])
    done = on_windows("predict", bundle.path, tmp_path / "a.npy", "--out", tmp_path / "o.csv")
    assert done.returncode == 0, done.stderr
    assert "locks [(2, 1)" in done.stderr
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "o.csv"]


def test_a_lock_waits_longer_than_windows_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """msvcrt.locking gives up after ten seconds."""
    outcomes = [OSError(errno.EDEADLK, "deadlock avoided"), OSError(errno.EDEADLK, "deadlock avoided"), None]

    def locking(descriptor: int, mode: int, size: int) -> None:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", SimpleNamespace(LK_LOCK=1, LK_NBLCK=2, locking=locking), raising=False)
    with (tmp_path / "file").open("wb") as file:
        assert locks.lock(file, wait=True)
    assert outcomes == []


def test_serve_says_where_it_runs(bundle: Bundle) -> None:
    done = on_windows("serve", bundle.path)
    assert done.returncode == 2, done.stderr
    assert "error: mpdsgr serve needs Linux or macOS" in done.stderr


def test_no_other_module_needs_posix() -> None:
    """Imports on the top level of a module; those in a `try` or a function are tried where they are used."""
    package = Path(mpdsgr_deploy.__file__).parent
    needing = set()
    for file in package.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if ABSENT & set(names):
                needing.add(str(file.relative_to(package)))
    assert needing == {"serving/server.py"}
