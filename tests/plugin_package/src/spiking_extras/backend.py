"""A backend: the reference implementation of the ONNX standard, slow and exact."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import NoiseSource, check_images


@contextmanager
def open_reference(bundle: Bundle, precision: str, noise: NoiseSource) -> Iterator[Predictor]:
    """Answers of `onnx.reference`, for networks without noise."""
    manifest = bundle.manifest
    network = ReferenceEvaluator(str(bundle.variant(precision)))

    def answer(x: NDArray[np.float32]) -> NDArray[np.float32]:
        check_images(x, manifest.input_shape)
        (logits,) = network.run(None, {manifest.input_name: x})
        return logits

    yield answer
