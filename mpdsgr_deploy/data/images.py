"""A set of labelled images in memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError


def to_unit(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Convert uint8 of any shape to float32 in [0, 1], as models take it; float32 is returned unchanged."""
    return pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels


@dataclass  # not frozen: Fabric copies it field by field into the processes it starts
class Images:
    """pixels uint8 [N, C, H, W], classes int64 [N] in [0, K), labels: the K class names."""

    pixels: NDArray[np.uint8]
    classes: NDArray[np.int64]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> "Images":
        return Images(self.pixels[index], self.classes[index], self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def unit(self) -> NDArray[np.float32]:
        """Return all pixels as float32 in [0, 1]."""
        return to_unit(self.pixels)

    def require_kind(self, name: str, shape: tuple[int, int, int], labels: tuple[str, ...]) -> None:
        """Raise InputError unless these images, of data set `name`, have a network's input shape and class names."""
        if self.shape != shape or self.labels != labels:
            raise InputError(
                f"{name} is not what the network was made for: its images have shape {self.shape} and classes "
                f"{', '.join(self.labels[:5])}; the network takes {shape} and {', '.join(labels[:5])}"
            )

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation per channel, in [0, 1] units."""
        levels = np.arange(256)
        mean, std = [], []
        for c in range(self.shape[0]):
            # by histograms of some images at a time: a float copy of a large data set would not fit into memory
            counts = np.zeros(256, np.int64)
            for start in range(0, len(self), 1000):
                counts += np.bincount(self.pixels[start : start + 1000, c].ravel(), minlength=256)
            average = counts @ levels / counts.sum()
            deviation = np.sqrt(counts @ (levels - average) ** 2 / counts.sum())
            mean.append(float(average) / 255)
            # at least one grey level, so that a constant channel can be divided by its own
            std.append(max(1.0, float(deviation)) / 255)
        return mean, std
