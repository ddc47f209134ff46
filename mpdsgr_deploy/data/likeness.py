"""Whether images look like those a network was trained on, judged by the mean and the spread of their pixels.

A classifier gives confident wrong answers to inverted digits, to pixels on another scale, and to another order of
colours. Every network holds mean and standard deviation of its training images, to normalise its input by.
"""

from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from mpdsgr_deploy.schema import Number, Positive

SAMPLE, GRID = 1024, 32  # how many images are examined, and about how many rows and columns of pixels of each
# A network's training images are spread around their mean by `std` over all pixels; the mean of a single image by less
# than that, so a mean of n images that is further off than SHIFT + CHANCE / sqrt(n) is significant.
SHIFT, CHANCE = 0.5, 1.5
SPREAD, ENOUGH = 2.5, 8  # factor by which the spread may differ, checked for at least this many images


class PixelStatistics(BaseModel):
    """Mean and standard deviation per channel of the training images, in [0, 1] units."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: Annotated[tuple[Number, ...], Field(min_length=1)]
    std: Annotated[tuple[Positive, ...], Field(min_length=1)]


class Likeness:
    """Compares images with `trained`, batch after batch; `warning` describes a difference, or is None."""

    def __init__(self, trained: PixelStatistics) -> None:
        self._trained = trained
        self._images = self._pixels = 0
        self._sum = self._squares = np.zeros(len(trained.mean))

    def add(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> Self:
        """Count images [B, C, H, W], uint8 or float32 in [0, 1], up to SAMPLE in all."""
        rows, columns = (max(1, side // GRID) for side in images.shape[2:])
        part = images[: max(0, SAMPLE - self._images), :, ::rows, ::columns]
        scale = 255 if part.dtype == np.uint8 else 1
        channels = np.moveaxis(part, 1, 0).reshape(part.shape[1], -1).astype(np.float64) / scale
        self._images, self._pixels = self._images + len(part), self._pixels + channels.shape[1]
        self._sum = self._sum + channels.sum(1)
        self._squares = self._squares + (channels**2).sum(1)
        return self

    def warning(self) -> str | None:
        """One line of text if mean or spread of these images is far from that of the training images, else None."""
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
