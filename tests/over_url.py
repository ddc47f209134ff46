"""What tests of a server that is asked over its URL share: a linear network, and a real one."""

from collections.abc import Iterator

import numpy as np
import pytest

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import open_predictor

SHAPE = (1, 8, 8)
INPUTS = {"images": SHAPE}
FAST = 1000.0  # requests a second


def linear(x: np.ndarray) -> np.ndarray:
    """Logits with all 24 bits of float32 in use."""
    return (x.reshape(len(x), -1) @ np.random.default_rng(1).normal(size=(64, 10))).astype(np.float32)


@pytest.fixture
def network(bundle: Bundle) -> Iterator[Predictor]:
    with open_predictor(bundle) as predictor:
        yield predictor
