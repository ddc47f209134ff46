"""A set of labelled images in memory, and a fixed order of test images in which every prefix is a sample of the whole.

References, validation, trials of precisions, golden inputs and spike flips all use the first N test images of this
order. In a data set that is listed class by class, these would otherwise be N images of its first class.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError

ORDER_SEED = 0
MIXED = {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100"}  # data sets whose published order mixes the classes


def to_unit(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Convert uint8 of any shape to float32 in [0, 1], as models take it; float32 is returned unchanged."""
    return pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels


@dataclass  # not frozen: Fabric copies it field by field into the processes it starts
class Images:
    """Labelled images: pixels uint8 [N, C, H, W], classes int64 [N] in [0, K), and labels, the K class names."""

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
                f"{name} does not fit the network: its images have shape {self.shape} and classes "
                f"{', '.join(self.labels[:5])}, but the network takes {shape} and {', '.join(labels[:5])}"
            )

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return the mean and the standard deviation [C] of the pixels in [0, 1], the latter at least 1/255."""
        levels = np.arange(256)
        mean, std = [], []
        for c in range(self.shape[0]):
            # computed from histograms of 1000 images, because a float copy of a large data set would not fit in memory
            counts = np.zeros(256, np.int64)
            for start in range(0, len(self), 1000):
                counts += np.bincount(self.pixels[start : start + 1000, c].ravel(), minlength=256)
            average = counts @ levels / counts.sum()
            deviation = np.sqrt(counts @ (levels - average) ** 2 / counts.sum())
            mean.append(float(average) / 255)
            # at least one grey level, so that a constant channel can be divided by it
            std.append(max(1.0, float(deviation)) / 255)
        return mean, std


def in_sampling_order(images: Images) -> Images:
    """Return the images unchanged if their classes are already mixed, else in `stratified_order`.

    Digits, MNIST and CIFAR therefore keep their published order, and results on their first N images are comparable
    with those of others.
    """
    return images[stratified_order(images.classes)] if is_class_by_class(images.classes) else images


def name_sample(n: int, data: str) -> str:
    """Describe the first n test images of data set `data` in words; only those of MIXED have an order readers know."""
    return f"the first {n} test images of {data}" if data in MIXED else f"{n} test images of {data}, a fixed sample"


def is_class_by_class(classes: NDArray[np.int64]) -> bool:
    """Whether neighbours in classes [N] differ less than half as often as they would in random order.

    In random order, neighbours differ with probability 1 - sum_k p_k^2, where p_k is the share of class k.
    """
    if len(classes) < 2:
        return False
    shares = np.bincount(classes) / len(classes)
    expected_changes = (len(classes) - 1) * (1 - float(shares @ shares))
    changes = int((classes[1:] != classes[:-1]).sum())
    return changes < expected_changes / 2


def stratified_order(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a fixed permutation [N] of images: one of every class first, then all classes in proportion to their size.

    classes: [N]. The i-th of the m images of a class, which are shuffled, is put at (i + u) / m of the whole, with one
    random u in [0, 1) per class. In every prefix, the counts of classes of equal size differ by at most 1.
    """
    generator = np.random.default_rng(ORDER_SEED)
    position, is_later = np.empty(len(classes)), np.ones(len(classes), bool)
    for k in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == k))
        position[members] = (np.arange(len(members)) + generator.random()) / len(members)
        is_later[members[0]] = False
    return np.lexsort((position, is_later)).astype(np.int64)
