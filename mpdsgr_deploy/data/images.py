"""A set of labelled images in memory."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
        """Channels, height, width."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def unit(self) -> NDArray[np.float32]:
        """What a model sees: float32 in [0, 1]."""
        return self.pixels.astype(np.float32) / np.float32(255)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel, in [0, 1] units."""
        mean = [float(self.pixels[:, c].mean() / 255) for c in range(self.shape[0])]
        # at least one grey level, so that a constant channel can be divided by its own
        std = [max(1.0, float(self.pixels[:, c].std())) / 255 for c in range(self.shape[0])]
        return mean, std
