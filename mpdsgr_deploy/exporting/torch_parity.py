"""Compute the logits of a torch network and of its float32 ONNX file, which must agree before a bundle is written."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpdsgr_deploy.data import Images
from mpdsgr_deploy.parity import TOLERANCE, Parity, compare, in_batches
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.torch_model import TorchModel

PARITY_BATCHES = (1, 2, 5, 33)  # sizes of the batches that torch and the ONNX file are compared on


class ComparedLogits(NamedTuple):
    """Images [B, C, H, W], and the logits [B, K] that the torch network and its float32 ONNX file give for them."""

    inputs: np.ndarray
    torch: np.ndarray
    onnx: np.ndarray

    @property
    def parity(self) -> Parity:
        return compare(self.torch, self.onnx)

    @property
    def agreeing(self) -> np.ndarray:
        """Which rows [B] differ by float32 rounding at most."""
        return np.abs(self.torch - self.onnx).max(1) <= TOLERANCE


def compared_logits(model: TorchModel, inputs: np.ndarray, file: Path) -> ComparedLogits:
    """Return the logits of both networks, computed in batches of several sizes. file: the ONNX file of `model`."""
    with OnnxRuntime(file, noise=model.noise) as artefact:
        answers = (in_batches(network, inputs, PARITY_BATCHES) for network in (model, artefact))
        return ComparedLogits(inputs, *answers)


def probe_images(images: Images | None, shape: tuple[int, int, int]) -> np.ndarray:
    """Return images float32 [B, C, H, W] in [0, 1] for the parity check: test images, or noise if there are none."""
    count = sum(PARITY_BATCHES)
    if images is not None:
        return images[:count].unit()
    return np.random.default_rng(0).random((count, *shape), np.float32)
