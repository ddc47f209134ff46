"""MPD-APGD: APGD through surrogates whose tails reach the whole distribution of membrane potentials.

    dO/dU = 1 / (1 + k |U - V_th|)^2        for each sharpness k in turn, the loss climbed by `apgd`

The surrogate of training ends a window's width from the threshold, so a silent neuron far below it has no gradient and
an attack cannot wake it. A tail that falls with the square of the distance gives every neuron a weak gradient, the
weaker the further its potential lies from V_th. A fixed step wastes it, since it moves pixels past the threshold
crossings that it announces; steps that halve whenever the loss stops rising make use of it. No single k is best for all
images, so k changes from one random start to the next.
"""

from collections.abc import Sequence
from typing import Literal

from array_api_compat import array_namespace, device

from mpdsgr_deploy.attacks.apgd import apgd
from mpdsgr_deploy.attacks.pgd import Draw, wide
from mpdsgr_deploy.protocols import Array, Differentiable

SHARPNESSES = (10.0, 20.0, 30.0)  # k of superspike:k


def mpd_apgd(
    targets: Sequence[Differentiable],
    x: Array,
    y: Array,
    *,
    eps: float,
    steps: int = 100,
    draw: Draw | None = None,
    keep: Literal["broken", "worst"] = "broken",
    restarts: int = 1,
) -> Array:
    """Adversarial images for x [B, C, H, W] in [0, 1] with classes y [B]: `restarts` rounds of APGD on every target.

    targets: one network through surrogates of different sharpness; with a single target and one round this is `apgd`.
    draw: as of `pgd`; every round on every target starts elsewhere. keep: "broken" drops an image from the batch as
    soon as it fools a target, so it costs at most (steps + 2) * len(targets) * restarts gradients per image; "worst"
    runs all rounds and returns the iterate of the largest loss, for stochastic targets. Starting points are drawn
    beforehand, so they do not depend on which images broke. Raises ValueError for `restarts` > 1 without a `draw`.
    """
    if restarts > 1 and draw is None:
        raise ValueError("restarts without a draw would all start at x; pass one")
    xp = array_namespace(x)
    rounds = [(target, draw and draw(x.shape)) for _ in range(restarts) for target in targets]
    adversarial = xp.asarray(x, copy=True)
    largest = xp.full((x.shape[0],), -xp.inf, dtype=x.dtype, device=device(x))
    active = xp.arange(x.shape[0], device=device(x))  # images not broken yet
    for target, offsets in rounds:
        chosen, classes = x[active], y[active]
        start = None if offsets is None else _constant(offsets[active])
        attempt = apgd(target, chosen, classes, eps=eps, steps=steps, draw=start, keep=keep)
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


def _constant(offsets: Array) -> Draw:
    """A draw whose values in [-1, 1] are known beforehand."""
    return lambda shape: offsets
