"""What Windows lacks is stood in for: the torch-free commands work without POSIX's modules."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.recipe import Data

# Imports of POSIX's modules fail; msvcrt is one that records its calls. posixpath and the file system stay, so this
# shows what is imported and called, not how Windows behaves.
STAND_IN = """
import signal, subprocess, sys, types
for name in ("fcntl", "resource", "uvloop", "pwd", "grp"):
    sys.modules[name] = None
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
