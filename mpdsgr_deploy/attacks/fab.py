"""FAB-T, the targeted Fast Adaptive Boundary attack, which minimises the L-infinity norm of the change.

Source: Croce & Hein, arXiv 1907.02044; the targeted form and its settings are those of AutoAttack (arXiv 2003.01690).
"""

import numpy as np

from mpdsgr_deploy.attacks.pgd import wide
from mpdsgr_deploy.attacks.targets import CLASSES_AIMED_AT, Classes, Floats, difference, from_to, try_each_class
from mpdsgr_deploy.protocols import Differentiable, Predictor

MOST_TOWARDS_START = 0.1  # alpha_max: largest weight of the step that starts at the clean image
OVERSHOOT = 1.05  # eta: length of a step, as a multiple of the distance to the boundary
KEPT_OF_CHANGE = 0.9  # beta: factor by which a change that fools the network shrinks, to continue nearer to x


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
    """Return adversarial images within eps of x [B, C, H, W] in [0, 1] with classes y [B].

    network: computes logits; gradients: the same network, differentiated with the loss "weighted". Every attempt starts
    at x and aims at one of the `classes` likeliest wrong classes, so an image costs at most steps * classes gradients.
    An image is attacked no further once a change of at most eps fools the network; an image that is never fooled is
    returned unchanged, as is every image of a network with a single class.
    """

    count = network(x[:1]).shape[1]

    def attempt(chosen: Floats, pairs: Classes, places: Classes) -> Floats:
        return _towards(network, gradients, chosen, pairs, eps, steps, count)

    return try_each_class(network, x, y, attempt, classes)


def _towards(
    network: Predictor, gradients: Differentiable, x: Floats, pairs: Classes, eps: float, steps: int, count: int
) -> Floats:
    """Return images x [B, C, H, W], moved across the boundary where a change of at most eps suffices.

    pairs [B, 2]: the true class and the class aimed at. count: number of classes K.
    """
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
    """Return the next iterate: steps beyond the linearised boundary from `current` and from `clean`, averaged.

    gap [B]: logit of the class aimed at minus the true one at `current`; slope [B, C, H, W]: its gradient.
    """
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
    """Return the change of smallest L-infinity norm that moves points [B, D] in [0, 1] onto planes within [0, 1].

    The plane of a point is normals . x = offsets, with normals [B, D] and offsets [B]. If the plane does not meet
    [0, 1]^D, the change is the one that comes nearest to it.
    """
    side = (normals * points).sum(axis=1) - offsets
    downhill = -np.sign(side)[:, None] * np.sign(normals)
    room = np.where(downhill > 0, 1 - points, np.where(downhill < 0, points, 0))
    order, weights = np.argsort(room, axis=1), np.abs(normals)
    rooms, heavy = (np.take_along_axis(values, order, axis=1).astype(np.float64) for values in (room, weights))
    spent = np.cumsum(rooms * heavy, axis=1) - rooms * heavy  # covered by pixels that reach 0 or 1 earlier
    moving = heavy[:, ::-1].cumsum(axis=1)[:, ::-1]
    reached = spent + moving * rooms >= np.abs(side)[:, None]
    first = np.where(reached.any(axis=1), reached.argmax(axis=1), rooms.shape[1] - 1)[:, None]
    missing = np.abs(side)[:, None] - np.take_along_axis(spent, first, axis=1)
    slopes = np.take_along_axis(moving, first, axis=1)
    length = np.divide(missing, slopes, out=np.zeros_like(missing), where=slopes > 0)
    length = np.where(reached.any(axis=1, keepdims=True), length, 1.0)
    return (downhill * np.minimum(room, length)).astype(np.float32)


def _largest(change: Floats) -> Floats:
    """Return the L-infinity norm [B] of each image's change [B, C, H, W]."""
    return np.asarray(np.abs(change).reshape(len(change), -1).max(axis=1))
