"""What tests of `mpdsgr predict` share: jobs, and the command with a backend that takes its time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.prediction import workers
from mpdsgr_deploy.prediction.stream import Job
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import open_predictor

N, BATCH = 60, 4

# The command with a backend that takes its time, so that it can be hit in the middle. STANDS_STILL, "BYTES:PATH": it
# answers nothing more once that file is so large, however late it is hit.
SLOW_COMMAND = """
import os
import signal
import time
from contextlib import contextmanager
from mpdsgr_deploy.runtime.open import BACKENDS

@contextmanager
def slow(bundle, precision, noise):
    with BACKENDS["onnxruntime-cpu"](bundle, precision, noise) as predictor:
        def answer(x):
            time.sleep(0.03)
            size, _, path = os.environ.get("STANDS_STILL", "").partition(":")
            while path and os.path.exists(path) and os.path.getsize(path) >= int(size):
                time.sleep(1)
            return predictor(x)
        yield answer

BACKENDS.add("slow", slow)
if __name__ == "__main__":
    from mpdsgr_deploy.cli import main
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    main()
"""


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(load_test(bundle.manifest.recipe.data)[:N].pixels):
        Image.fromarray(pixels[0]).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def logits(bundle: Bundle) -> np.ndarray:
    """What the network says of the folder, batch by batch, without any of the machinery under test."""
    x = load_test(bundle.manifest.recipe.data)[:N].unit()
    with open_predictor(bundle) as predictor:
        return np.concatenate([predictor(x[i : i + BATCH]) for i in range(0, N, BATCH)])


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start the slow command, a process group of its own; what still runs of it at the end is killed."""
    (tmp_path / "slow.py").write_text(SLOW_COMMAND)
    running = []

    def start(*arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, tmp_path / "slow.py", "predict", *map(str, arguments), "--backend", "slow"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, **pipes, process_group=0))
        return running[-1]

    yield start
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def job(bundle: Bundle, *paths: Path, batch: int = BATCH, top: int = 1) -> Job:
    return Job(bundle, paths, "onnxruntime-cpu", "fp32", batch, top=top)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def answering(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipeline meet a predictor of the test's own."""
    monkeypatch.setattr(workers, "open_predictor", lambda *_: nullcontext(predictor))
