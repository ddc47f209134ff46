"""Check whether images look like those a network was trained on, by the mean and standard deviation of their pixels.

A classifier gives confident wrong answers to inverted digits, to pixels on another scale, and to another order of
colours. The comparison needs only the statistics by which a network normalises its input.
"""

from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from mpdsgr_deploy.schema import Number, Positive

SAMPLE, GRID = 1024, 32  # how many images are examined, and about how many rows and columns of pixels of each
# The pixels of training images deviate from their mean by `std`, and the mean of a single image by less. A mean of n
# images that is further than SHIFT + CHANCE / sqrt(n) standard deviations from the training mean is therefore reported.
SHIFT, CHANCE = 0.5, 1.5
SPREAD, ENOUGH = 2.5, 8  # the factor by which standard deviations may differ, and the images needed to check that


class PixelStatistics(BaseModel):
    """The mean and standard deviation [C] of the training images, whose pixels are in [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: Annotated[tuple[Number, ...], Field(min_length=1)]
    std: Annotated[tuple[Positive, ...], Field(min_length=1)]


class Likeness:
    """Compares images, batch after batch, with the statistics of the training images."""

    def __init__(self, trained: PixelStatistics) -> None:
        self._trained = trained
        self._images = self._pixels = 0
        self._sum = self._squares = np.zeros(len(trained.mean))

    def add(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> Self:
        """Include images [B, C, H, W], uint8 or float32 in [0, 1], up to SAMPLE in all; return this object."""
        rows, columns = (max(1, side // GRID) for side in images.shape[2:])
        part = images[: max(0, SAMPLE - self._images), :, ::rows, ::columns]
        scale = 255 if part.dtype == np.uint8 else 1
        channels = np.moveaxis(part, 1, 0).reshape(part.shape[1], -1).astype(np.float64) / scale
        self._images, self._pixels = self._images + len(part), self._pixels + channels.shape[1]
        self._sum = self._sum + channels.sum(1)
        self._squares = self._squares + (channels**2).sum(1)
        return self

    def warning(self) -> str | None:
        """Return one line of text if the images differ clearly from the training images, else None."""
        if not self._images:
            return None
        mean = self._sum / self._pixels
        std = np.sqrt(np.maximum(self._squares / self._pixels - mean**2, 0))
        trained_mean, trained_std = np.array(self._trained.mean), np.array(self._trained.std)
        shift = float((np.abs(mean - trained_mean) / trained_std).max())
        ratio = std / trained_std
        is_shifted = shift > SHIFT + CHANCE / np.sqrt(self._images)
        is_spread = self._images >= ENOUGH and (ratio.max() > SPREAD or ratio.min() < 1 / SPREAD)
        if not (is_shifted or is_spread):
            return None
        inverted = np.abs(1 - mean - trained_mean).max() < np.abs(mean - trained_mean).max() / 2
        cause = (
            "they look inverted (dark on light against light on dark)"
            if inverted
            else ("check their scale, background and colour order")
        )
        return (
            f"these images are unlike the training images: their pixels have mean {_listed(mean)} and standard "
            f"deviation {_listed(std)}, the training images' {_listed(trained_mean)} and {_listed(trained_std)} (of "
            f"[0, 1]); {cause}"
        )


def _listed(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
