"""What tests of mpdsgr bench share: a linear network, and a short load on its server."""

from typing import Any

import numpy as np
from oip_server import OipServer

from mpdsgr_deploy.serving.load import Load, LoadMeasurement, LoadOutcome, measure

INPUTS = {"images": (1, 8, 8)}
SHORT = Load(20.0, 50, concurrency=4)  # 5 requests before it to warm up, and one to try


def linear(*tensors: np.ndarray) -> np.ndarray:
    return np.tile(tensors[0].reshape(len(tensors[0]), -1).sum(1, np.float32, keepdims=True), (1, 10))


def load(server: OipServer, load: Load = SHORT, **options: Any) -> LoadOutcome:
    found = LoadMeasurement()
    measure(server.url, [load], found, **options)
    (outcome,) = found.outcomes
    return outcome
