"""A fixed order of test images in which every prefix is a sample of the whole.

References, validation, trials of precisions, golden inputs and flips all use the first N test images of this order. A
data set that is listed class by class would otherwise make that N images of its first class.
"""

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.data.images import Images

ORDER_SEED = 0
MIXED = {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100"}  # in the order that everybody knows


def in_sampling_order(images: Images) -> Images:
    """Return the images unchanged if their classes are already mixed, else in `stratified_order`.

    Digits, MNIST and CIFAR therefore keep their usual order, and results on their first N images stay comparable.
    """
    return images[stratified_order(images.classes)] if is_class_by_class(images.classes) else images


def name_sample(n: int, data: str) -> str:
    """Describe the first n images in words. Only the data sets MIXED have an order that readers know."""
    return f"the first {n} test images of {data}" if data in MIXED else f"{n} test images of {data}, a fixed sample"


def is_class_by_class(classes: NDArray[np.int64]) -> bool:
    """Whether neighbours in classes [N] share their class far more often than they would in random order.

    For class shares p_k, random order changes class between neighbours with probability 1 - sum p_k^2.
    """
    if len(classes) < 2:
        return False
    shares = np.bincount(classes) / len(classes)
    expected_changes = (len(classes) - 1) * (1 - float(shares @ shares))
    changes = int((classes[1:] != classes[:-1]).sum())
    return changes < expected_changes / 2


def stratified_order(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """A fixed permutation of classes [N]: one image of every class first, then every class in proportion to its size.

    Classes of equal size are balanced in every prefix: their counts differ by at most 1. The i-th of the m images of a
    class, themselves in random order, is put at (i + u) / m of the whole, with one random u in [0, 1) per class.
    """
    draw = np.random.default_rng(ORDER_SEED)
    position, is_later = np.empty(len(classes)), np.ones(len(classes), bool)
    for k in np.unique(classes):
        members = draw.permutation(np.flatnonzero(classes == k))
        position[members] = (np.arange(len(members)) + draw.random()) / len(members)
        is_later[members[0]] = False
    return np.lexsort((position, is_later)).astype(np.int64)
