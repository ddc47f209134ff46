"""A data set: noisy 6x6 images of horizontal or vertical stripes."""

import numpy as np

from mpdsgr_deploy.data import Images
from mpdsgr_deploy.recipe import Data


def load(config: Data, train: bool) -> Images:
    """400 images to train, 120 to test."""
    draw = np.random.default_rng(0 if train else 1)
    classes = draw.integers(0, 2, 400 if train else 120)
    horizontal = np.arange(6)[:, None] % 2 * np.ones((6, 6))
    pixels = np.where(classes[:, None, None] == 0, horizontal, horizontal.T) * 160 + draw.integers(0, 90, (1, 6, 6))
    noise = draw.integers(-60, 60, pixels.shape)
    return Images(np.clip(pixels + noise, 0, 255).astype(np.uint8)[:, None], classes, ("horizontal", "vertical"))
