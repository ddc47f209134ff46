"""MPD-APGD: adaptive steps through surrogates whose tails reach the whole distribution of membrane potentials.

    dO/dU = 1 / (1 + k |U - V_th|)^2        a sharpness k per round

The surrogate of training ends a window's width from the threshold, so a silent neuron far below it has no gradient and
an attack cannot wake it. A tail that falls with the square of the distance gives every neuron a weak gradient, the
weaker the further its potential lies from V_th. It takes many small steps to use it; a fixed step moves pixels past the
threshold crossings that the gradient announces. Rounds therefore take turns between SA-PGD's step (momentum
and a size per pixel) and APGD's (a size per image, halved when the loss stops rising), and between sharpnesses: no
single one is best for all images. See benchmarks/MPD_APGD.md.
"""

from collections.abc import Sequence
from typing import Literal

from array_api_compat import array_namespace, device

from mpdsgr_deploy.attacks.apgd import apgd
from mpdsgr_deploy.attacks.pgd import Draw, wide
from mpdsgr_deploy.attacks.sa_pgd import sa_pgd
from mpdsgr_deploy.protocols import Array, Differentiable, Gradient, State

Climb = Literal["sa-pgd", "apgd"]

SHARPNESSES = (20.0, 10.0, 30.0)  # k of superspike:k
FIRST_STEP = 0.5  # of APGD, in units of eps


def mpd_apgd(
    targets: Sequence[Differentiable],
    x: Array,
    y: Array,
    *,
    eps: float,
    steps: int = 150,
    rounds: int = 6,
    draw: Draw | None = None,
    keep: Literal["broken", "worst"] = "broken",
    climbs: Sequence[Climb] = ("sa-pgd", "apgd"),
) -> Array:
    """Adversarial images for x [B, C, H, W] in [0, 1] with classes y [B]: `rounds` climbs of `steps` steps.

    targets: one network through surrogates of different sharpness; round i takes the i-th of them and the i-th of
    `climbs`, both in turn. draw: as of `pgd`; every round starts elsewhere. keep: "broken" drops an image from the
    batch as soon as it fools a target, so it costs at most (steps + 2) * rounds gradients per image; "worst" runs all
    rounds and returns the iterate of the largest loss, for stochastic targets. Starting points are drawn beforehand, so
    they do not depend on which images broke. Raises ValueError if rounds of the same target and climb would start at
    the same point, for want of a `draw`.
    """
    if draw is None and rounds > 1 and len(targets) < rounds:
        raise ValueError("rounds without a draw would all start at x; pass one")
    xp = array_namespace(x)
    offsets = [None if draw is None else draw(x.shape) for _ in range(rounds)]
    adversarial = xp.asarray(x, copy=True)
    largest = xp.full((x.shape[0],), -xp.inf, dtype=x.dtype, device=device(x))
    active = xp.arange(x.shape[0], device=device(x))  # images not broken yet
    for number, offset in enumerate(offsets):
        target, climb = targets[number % len(targets)], climbs[number % len(climbs)]
        chosen, classes = x[active], y[active]
        start = None if offset is None else _constant(offset[active])
        if climb == "apgd":
            first = FIRST_STEP * eps
            attempt = apgd(target, chosen, classes, eps=eps, steps=steps, step=first, draw=start, keep=keep)
        else:
            attempt = sa_pgd(_Still(target), chosen, classes, eps=eps, steps=steps, draw=start, keep=keep)
        logits, loss, _ = target(attempt, classes)
        higher = loss > largest[active]
        standing = xp.argmax(logits, axis=1) == classes
        better = higher if keep == "worst" else higher | ~standing
        adversarial[active] = xp.where(wide(better), attempt, adversarial[active])
        largest[active] = xp.where(higher, loss, largest[active])
        if keep == "broken":
            active = active[standing]
        if not active.shape[0]:
            break
    return adversarial


class _Still:
    """A Differentiable as an Adaptive whose surrogates do not adapt."""

    def __init__(self, target: Differentiable) -> None:
        self._target = target

    def start(self, count: int) -> State:
        return {}

    def step(self, x: Array, y: Array, state: State) -> tuple[Gradient, State]:
        return self._target(x, y), state


def _constant(offsets: Array) -> Draw:
    """A draw whose values in [-1, 1] are known beforehand."""
    return lambda shape: offsets
