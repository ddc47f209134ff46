"""Auto-PGD in the L-infinity ball: PGD with momentum, whose step size follows the loss of each image.

Source: Croce & Hein, arXiv 2003.01690, Algorithm 1. APGD-CE and APGD-DLR are this attack with a target that computes
the cross-entropy or the difference of logits ratio (DLR). APGD-T, the second of the four attacks of AutoAttack's
standard version, maximises the targeted DLR for one wrong class after the other.
"""

from typing import Literal, NamedTuple

from array_api_compat import array_namespace, device

from mpdsgr_deploy.attacks.pgd import Draw, begin, fixed, project, still_right, wide
from mpdsgr_deploy.attacks.targets import CLASSES_AIMED_AT, Aimed, Classes, Floats, try_each_class
from mpdsgr_deploy.protocols import Array, Differentiable, Predictor

MOMENTUM = 0.75  # weight of the new step; the previous move has the rest of the weight
RHO = 0.75  # the step size halves if a smaller share of the steps since the last checkpoint raised the loss


def apgd(
    target: Differentiable,
    x: Array,
    y: Array,
    *,
    eps: float,
    steps: int = 100,
    step: float | None = None,
    draw: Draw | None = None,
    keep: Literal["broken", "worst"] = "broken",
) -> Array:
    """Return adversarial images for x [B, C, H, W] in [0, 1] with classes y [B].

    An image costs at most steps + 1 gradients. Its step size starts at `step`, by default 2 eps. At a checkpoint the
    step size halves and the image returns to the iterate of its largest loss if too few steps raised the loss, or if
    the largest loss has not grown since the checkpoint before and the step size did not halve there.

    y: pairs [B, 2] instead for a target that aims at a class, see `targets.Aimed`.
    draw, keep: see `pgd`. With "broken", an image leaves the batch as soon as it fools the target; for an image that
    never does, the iterate of the largest loss is returned.
    """
    xp = array_namespace(x)
    start = begin(x, eps, draw)
    adversarial = xp.asarray(start, copy=True)
    logits, loss, gradient = target(start, y)
    state = _at_start(xp, start, x, y, loss, gradient, 2 * eps if step is None else step)
    last_check, checks = 0, checkpoints(steps)
    for number in range(steps + 1):
        if keep == "broken" and xp.any(broken := ~still_right(xp, logits, state.y)):
            adversarial[state.index[broken]] = state.current[broken]
            state = state.only(~broken)
            if not state.y.shape[0]:
                break
        if number in checks:
            state = _check(xp, state, needed=RHO * (number - last_check))
            last_check = number
        if number == steps:
            break
        iterate = _step(xp, state, eps, MOMENTUM if number else 1.0)
        logits, loss, gradient = target(iterate, state.y)
        state = _advance(xp, state, iterate, loss, gradient)
    adversarial[state.index] = state.best
    return adversarial


def checkpoints(steps: int) -> set[int]:
    """Return the steps at which step sizes are judged: 22 %, 41 %, 57 %, ... of `steps`.

    The gap between checkpoints shrinks by 3 percentage points each time, to 6 at least.
    """
    percent, gap, numbers = 22, 22, set[int]()
    while percent <= 100:
        numbers.add(-(-percent * steps // 100))  # rounded up
        gap = max(gap - 3, 6)
        percent += gap
    return numbers


class _State(NamedTuple):
    """The images still under attack; every array is [B], or [B, C, H, W] for images and gradients."""

    index: Array  # position in the batch that was passed to `apgd`
    x: Array
    y: Array
    current: Array
    previous: Array
    gradient: Array  # at `current`
    best: Array  # the iterate of the largest loss
    best_gradient: Array
    largest: Array  # loss at `best`
    loss: Array  # at `current`
    eta: Array  # step size
    rises: Array  # number of steps since the last checkpoint that raised the loss
    largest_at_check: Array
    halved: Array  # whether the step size halved at the last checkpoint

    def only(self, chosen: Array) -> "_State":
        """Return the images for which `chosen` [B] is true."""
        return _State(*(part[chosen] for part in self))


def _at_start(xp: Array, start: Array, x: Array, y: Array, loss: Array, gradient: Array, step: float) -> _State:
    zero, index = xp.zeros_like(loss), xp.arange(x.shape[0], device=device(x))
    return _State(
        index, x, y, current=start, previous=start, gradient=gradient, best=start, best_gradient=gradient,
        largest=loss, loss=loss, eta=zero + step, rises=zero, largest_at_check=loss, halved=zero == 0,
    )  # fmt: skip


def _step(xp: Array, state: _State, eps: float, momentum: float) -> Array:
    iterate = state.current + wide(state.eta) * xp.sign(state.gradient)
    ascended = project(iterate, state.x, eps)
    carried = momentum * (ascended - state.current) + (1 - momentum) * (state.current - state.previous)
    return project(state.current + carried, state.x, eps)


def _advance(xp: Array, state: _State, iterate: Array, loss: Array, gradient: Array) -> _State:
    higher = loss > state.largest
    return state._replace(
        current=iterate,
        previous=state.current,
        gradient=gradient,
        best=xp.where(wide(higher), iterate, state.best),
        best_gradient=xp.where(wide(higher), gradient, state.best_gradient),
        largest=xp.where(higher, loss, state.largest),
        loss=loss,
        rises=state.rises + xp.astype(loss > state.loss, state.rises.dtype),
    )


def _check(xp: Array, state: _State, needed: float) -> _State:
    """Halve the step size of images whose loss rises too slowly, and return these images to their best iterate."""
    stuck = (state.largest <= state.largest_at_check) & ~state.halved
    halve = (state.rises < needed) | stuck
    return state._replace(
        eta=xp.where(halve, state.eta / 2, state.eta),
        current=xp.where(wide(halve), state.best, state.current),
        gradient=xp.where(wide(halve), state.best_gradient, state.gradient),
        loss=xp.where(halve, state.largest, state.loss),
        rises=xp.zeros_like(state.rises),
        largest_at_check=state.largest,
        halved=halve,
    )


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
    """Return adversarial images for x [B, C, H, W] in [0, 1] with classes y [B], by APGD-T.

    network: computes logits; gradients: the same network, differentiated with the loss "weighted".
    classes: number of wrong classes aimed at, the likeliest first; an image costs at most (steps + 1) * classes
    gradients. An image that the network misclassifies is attacked no further.
    draw, keep: see `apgd`. The attempt at each class has its own random start; all starts are drawn in advance.

    For a network with fewer than four classes, the loss is the difference of the two logits. A network with one class
    cannot be fooled, so x is returned unchanged.
    """
    target = Aimed(network, gradients)
    aims = min(classes, network(x[:1]).shape[1] - 1)
    offsets = iter([None if draw is None else draw(x.shape) for _ in range(aims)])

    def attempt(chosen: Floats, pairs: Classes, places: Classes) -> Floats:
        return apgd(target, chosen, pairs, eps=eps, steps=steps, draw=fixed(next(offsets), places), keep=keep)

    return try_each_class(network, x, y, attempt, classes)
