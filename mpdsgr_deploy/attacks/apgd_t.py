"""APGD-T: Auto-PGD on the targeted difference of logits ratio, aimed at one wrong class after the other.

Source: Croce & Hein, arXiv 2003.01690; the second of the four attacks of AutoAttack's standard version.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.apgd import apgd
from mpdsgr_deploy.attacks.pgd import Draw
from mpdsgr_deploy.attacks.targets import CLASSES_AIMED_AT, Aimed, try_each_class
from mpdsgr_deploy.protocols import Differentiable, Predictor

Floats = NDArray[np.float32]
Classes = NDArray[np.int64]


def apgd_t(
    network: Predictor,
    gradients: Differentiable,
    x: Floats,
    y: Classes,
    *,
    eps: float,
    steps: int = 100,
    classes: int = CLASSES_AIMED_AT,
    draw: Draw | None = None,
    keep: Literal["broken", "worst"] = "broken",
) -> Floats:
    """Adversarial images for x [B, C, H, W] in [0, 1] with classes y [B], after (steps + 1) * classes gradients each.

    network: answers; gradients: the same network with the loss "weighted". draw, keep: as of `apgd`; every class is
    approached from a start of its own, drawn beforehand. An image is left alone once the network gets it wrong. With
    fewer than four classes the loss is the difference of the two logits; with one class x comes back as it is.
    """
    target = Aimed(network, gradients)
    aims = min(classes, network(x[:1]).shape[1] - 1)
    offsets = iter([None if draw is None else draw(x.shape) for _ in range(aims)])

    def attempt(chosen: Floats, pairs: Classes, places: Classes) -> Floats:
        offset = next(offsets)
        start: Draw | None = None if offset is None else lambda shape: offset[places]
        return np.asarray(apgd(target, chosen, pairs, eps=eps, steps=steps, draw=start, keep=keep))

    return try_each_class(network, x, y, attempt, classes)
