"""A backend for tests: onnxruntime, which stands still at a large batch while a file exists."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime
from mpdsgr_deploy.runtime.session import CPU

LARGE = 10_000  # images


@contextmanager
def open_held(bundle: Bundle, precision: str, noise: NoiseSource) -> Iterator[Predictor]:
    """While HELD_GATE names a file, a large batch is announced by `HELD_GATE.entered` and waits for its removal."""
    gate = Path(os.environ["HELD_GATE"])
    with OnnxRuntime(bundle.variant(precision), CPU, noise) as network:

        def answer(x: NDArray[np.float32]) -> NDArray[np.float32]:
            if len(x) >= LARGE and gate.exists():
                gate.with_suffix(".entered").touch()
                while gate.exists():
                    time.sleep(0.002)
            return network(x)

        yield answer
