"""Losses that aim at a wrong class, and attacks that try several wrong classes in turn.

In formulas, z are the logits, y is the true class, t the class aimed at, and z_(k) the k-th largest logit. The loss and
its gradient in the logits are computed here with numpy; the network backpropagates that gradient to the image.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from mpdsgr_deploy.protocols import Array, Differentiable, Gradient, Predictor

Floats = NDArray[np.float32]
Classes = NDArray[np.int64]

CLASSES_AIMED_AT = 9  # number of wrong classes tried, the likeliest first, as in AutoAttack's standard version
TINY = 1e-12  # keeps the ratio finite if the logits are equal


class AimedLoss(NamedTuple):
    """A loss (value) [B] and its gradient in the logits (weights) [B, K]."""

    value: Floats
    weights: Floats


def difference(logits: Floats, y: Classes, aim: Classes) -> AimedLoss:
    """Return z_t - z_y for logits [B, K] and classes y, aim [B]; it is positive where the aim beats the true class."""
    rows = np.arange(len(y))
    return AimedLoss(logits[rows, aim] - logits[rows, y], from_to(y, aim, logits.shape[1]))


def best_wrong(logits: Floats, y: Classes) -> AimedLoss:
    """Return `difference` aimed at the largest wrong logit, which is minus the margin."""
    wrong = logits.copy()
    wrong[np.arange(len(y)), y] = -np.inf
    return difference(logits, y, wrong.argmax(axis=1))


def from_to(y: Classes, aim: Classes, count: int) -> Floats:
    """Return the gradient of z_t - z_y in the logits, [B, count], for `count` classes."""
    rows, weights = np.arange(len(y)), np.zeros((len(y), count), np.float32)
    weights[rows, aim] = 1
    weights[rows, y] = -1
    return weights


def targeted_dlr(logits: Floats, y: Classes, aim: Classes) -> AimedLoss:
    """Return the targeted difference of logits ratio, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2).

    It needs four classes; with fewer, it is `difference`. Source: arXiv 2003.01690, eq. 7.
    """
    gap, slope = difference(logits, y, aim)
    if logits.shape[1] < 4:
        return AimedLoss(gap, slope)
    rows, ranked = np.arange(len(y)), np.argsort(-logits, axis=1, kind="stable")
    spread_slope = np.zeros_like(logits)
    for rank, share in ((0, 1.0), (2, -0.5), (3, -0.5)):
        spread_slope[rows, ranked[:, rank]] = share
    spread = (spread_slope * logits).sum(axis=1) + np.float32(TINY)
    ratio = gap / spread
    return AimedLoss(ratio, (slope - ratio[:, None] * spread_slope) / spread[:, None])


class Aimed:
    """A Differentiable with the loss `targeted_dlr`, for pairs [B, 2] of the true class and the class aimed at.

    network: computes logits; gradients: the same network, differentiated with the loss "weighted" (see
    `attacks.condition.Network`).
    """

    def __init__(self, network: Predictor, gradients: Differentiable) -> None:
        self._network, self._gradients = network, gradients

    def __call__(self, x: Floats, pairs: Classes) -> Gradient:
        value, weights = targeted_dlr(self._network(x), pairs[:, 0], pairs[:, 1])
        answer = self._gradients(x, weights)
        return Gradient(answer.logits, value, answer.gradient)


def try_each_class(
    network: Predictor,
    x: Floats,
    y: Classes,
    attempt: Callable[[Floats, Classes, Classes], Floats],
    classes: int = CLASSES_AIMED_AT,
) -> Floats:
    """Attack images x [B, C, H, W] of classes y [B] with each of the likeliest wrong classes as the aim, in turn.

    attempt: maps the images that are still classified correctly [b, C, H, W], pairs of their true class and the class
    aimed at [b, 2], and their positions in x [b] to attacked images. An image leaves the batch once the network
    misclassifies it. classes: the most classes to try. A network with one class has no wrong class, so x is returned
    unchanged.
    """
    adversarial, active = x.copy(), np.arange(len(x))
    for aims in likeliest_wrong(network(x), y)[:, :classes].T:
        if not len(active):
            break
        pairs = np.stack([y[active], aims[active]], axis=1)
        adversarial[active] = attempt(x[active], pairs, active)
        active = active[network(adversarial[active]).argmax(axis=1) == y[active]]
    return adversarial


def likeliest_wrong(logits: Array, y: Array) -> Array:
    """Return the wrong classes, largest logit first [B, K - 1], for logits [B, K] in a numpy array or torch tensor."""
    ranked = array_namespace(logits).argsort(logits, axis=1, descending=True)
    return ranked[ranked != y[:, None]].reshape(len(y), -1)
