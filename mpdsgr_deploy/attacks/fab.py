"""FAB-T, the targeted Fast Adaptive Boundary attack in the L-infinity norm: the smallest change that fools a network.

Source: Croce & Hein, arXiv 1907.02044; the targeted form and its settings are those of AutoAttack (arXiv 2003.01690).
"""

import numpy as np

from mpdsgr_deploy.attacks.pgd import wide
from mpdsgr_deploy.attacks.targets import CLASSES_AIMED_AT, Classes, Floats, difference, from_to, try_each_class
from mpdsgr_deploy.protocols import Differentiable, Predictor

MOST_TOWARDS_START = 0.1  # alpha_max: how far a step may mix in the projection of the clean image
OVERSHOOT = 1.05  # eta: how far beyond the boundary a step goes, of the way to it
KEPT_OF_CHANGE = 0.9  # beta: what is kept of a change that fools the network, to go on from nearer to the clean image


def fab_t(
    network: Predictor,
    gradients: Differentiable,
    x: Floats,
    y: Classes,
    *,
    eps: float,
    steps: int = 100,
    classes: int = CLASSES_AIMED_AT,
) -> Floats:
    """Attacked images within eps for x [B, C, H, W] in [0, 1] with classes y [B], after steps * classes gradients each.

    network: answers; gradients: the same network with the loss "weighted". Every attempt starts at x and aims at one
    of the likeliest wrong classes. An image is left alone once a change of at most eps fools the network; what it
    never breaks comes back as x. With one class there is nothing to aim at.
    """

    count = network(x[:1]).shape[1]

    def attempt(chosen: Floats, pairs: Classes, places: Classes) -> Floats:
        return _towards(network, gradients, chosen, pairs, eps, steps, count)

    return try_each_class(network, x, y, attempt, classes)


def _towards(
    network: Predictor, gradients: Differentiable, x: Floats, pairs: Classes, eps: float, steps: int, count: int
) -> Floats:
    """Images x [B, C, H, W] of pairs [B, 2] moved across the boundary, where a change of at most eps does that."""
    adversarial, current, active = x.copy(), x.copy(), np.arange(len(x))
    for _ in range(steps):
        if not len(active):
            break
        (y, aim), clean = pairs[active].T, x[active]
        logits, _, slope = gradients(current, from_to(y, aim, count))
        current = _step(current, clean, difference(logits, y, aim).value, slope)
        fooled = network(current).argmax(axis=1) != y
        near = fooled & (_largest(current - clean) <= eps)
        adversarial[active[near]] = current[near]
        shrunk = clean + np.float32(KEPT_OF_CHANGE) * (current - clean)
        current, active = np.where(wide(fooled), shrunk, current)[~near], active[~near]
    return adversarial


def _step(current: Floats, clean: Floats, gap: Floats, slope: Floats) -> Floats:
    """Beyond the boundary of the network as it is linear at `current`, mixed with the same from the clean image."""
    flat = slope.reshape(len(slope), -1)
    offset = (flat * current.reshape(flat.shape)).sum(axis=1) - gap  # the boundary: flat . x = offset
    here, there = (
        onto_plane(images.reshape(flat.shape), flat, offset).reshape(current.shape) for images in (current, clean)
    )
    far_here, far_there = (np.maximum(_largest(change), 1e-8) for change in (here, there))
    share = wide(np.minimum(far_here / (far_here + far_there), MOST_TOWARDS_START)).astype(np.float32)
    eta = np.float32(OVERSHOOT)
    return np.clip((current + eta * here) * (1 - share) + (clean + eta * there) * share, 0, 1)


def onto_plane(points: Floats, normals: Floats, offsets: Floats) -> Floats:
    """The change of smallest largest entry that brings each of points [B, D] in [0, 1] onto normals . x = offsets.

    normals [B, D], offsets [B]. The result stays in [0, 1]; where the plane does not meet that box, it is the change
    that comes nearest to it.
    """
    side = (normals * points).sum(axis=1) - offsets
    downhill = -np.sign(side)[:, None] * np.sign(normals)
    room = np.where(downhill > 0, 1 - points, np.where(downhill < 0, points, 0))
    order, weights = np.argsort(room, axis=1), np.abs(normals)
    rooms, heavy = (np.take_along_axis(values, order, axis=1).astype(np.float64) for values in (room, weights))
    spent = np.cumsum(rooms * heavy, axis=1) - rooms * heavy  # by pixels whose room is smaller
    moving = heavy[:, ::-1].cumsum(axis=1)[:, ::-1]
    reached = spent + moving * rooms >= np.abs(side)[:, None]
    first = np.where(reached.any(axis=1), reached.argmax(axis=1), rooms.shape[1] - 1)[:, None]
    missing = np.abs(side)[:, None] - np.take_along_axis(spent, first, axis=1)
    slopes = np.take_along_axis(moving, first, axis=1)
    length = np.divide(missing, slopes, out=np.zeros_like(missing), where=slopes > 0)
    length = np.where(reached.any(axis=1, keepdims=True), length, 1.0)
    return (downhill * np.minimum(room, length)).astype(np.float32)


def _largest(change: Floats) -> Floats:
    """Return the largest entry of each image's change [B]."""
    return np.asarray(np.abs(change).reshape(len(change), -1).max(axis=1))
