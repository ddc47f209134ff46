"""SA-PGD (Wang et al., arXiv 2512.22522): momentum and a step size per pixel, for gradients that are imprecise.

    m <- m / 2 + h    w <- 0.8 w + h^2 / mean(h^2)    h = gradient / mean |gradient|
    x <- project(x + eta clip(m / sqrt(w), -1, 1))

with their published settings; eta starts at eps and halves at the checkpoints of APGD. It is made for surrogates that
adapt during the attack (ASSG, see `attack_graph.adaptive`), whose state it carries from step to step.
"""

from typing import Literal, NamedTuple

from array_api_compat import array_namespace, device

from mpdsgr_deploy.attacks.apgd import checkpoints
from mpdsgr_deploy.attacks.pgd import Draw, begin, project, still_right, wide
from mpdsgr_deploy.protocols import Adaptive, Array, Gradient


def sa_pgd(
    target: Adaptive,
    x: Array,
    y: Array,
    *,
    eps: float,
    steps: int = 100,
    draw: Draw | None = None,
    keep: Literal["broken", "worst"] = "broken",
) -> Array:
    """Adversarial images for x [B, C, H, W] in [0, 1] with classes y [B], after steps + 1 gradients an image at most.

    draw, keep: as of `apgd`.
    """
    xp = array_namespace(x)
    start = begin(x, eps, draw)
    adversarial = xp.asarray(start, copy=True)
    state = _Progress(xp.arange(x.shape[0], device=device(x)), x, y, start, start, xp.full_like(x[:, 0, 0, 0], -xp.inf))
    momentum, power = xp.zeros_like(x), xp.zeros_like(x)
    adapted = target.start(x.shape[0])
    eta, checks = eps, checkpoints(steps)
    for number in range(steps + 1):
        answer, adapted = target.step(state.current, state.y, adapted)
        state = _seen(xp, state, answer)
        gradient = answer.gradient
        if keep == "broken" and xp.any(broken := ~still_right(xp, answer.logits, state.y)):
            adversarial[state.index[broken]] = state.current[broken]
            state, adapted = state.only(~broken), {name: part[~broken] for name, part in adapted.items()}
            momentum, power, gradient = momentum[~broken], power[~broken], gradient[~broken]
        if number == steps or not state.y.shape[0]:
            break
        eta = eta / 2 if number in checks else eta
        h = gradient / _mean(xp, xp.abs(gradient))
        momentum = momentum / 2 + h
        squared = h**2
        power = 0.8 * power + squared / _mean(xp, squared)
        move = (momentum / (xp.sqrt(power) + 1e-12)).clip(-1.0, 1.0)
        state = state._replace(current=project(state.current + eta * move, state.x, eps))
    adversarial[state.index] = state.best
    return adversarial


class _Progress(NamedTuple):
    """The images still under attack; [B] or [B, C, H, W]."""

    index: Array  # place in the batch that was handed in
    x: Array
    y: Array
    current: Array
    best: Array  # where the loss was largest
    largest: Array

    def only(self, chosen: Array) -> "_Progress":
        """The images where `chosen` [B]."""
        return _Progress(*(part[chosen] for part in self))


def _seen(xp: Array, state: _Progress, answer: Gradient) -> _Progress:
    higher = answer.loss > state.largest
    return state._replace(
        best=xp.where(wide(higher), state.current, state.best),
        largest=xp.where(higher, answer.loss, state.largest),
    )


def _mean(xp: Array, values: Array) -> Array:
    """Return each image's mean [B, 1, 1, 1]; 1 where it is 0, because its dividend is 0 there too."""
    mean = xp.mean(values, axis=(1, 2, 3), keepdims=True)
    return xp.where(mean > 0, mean, xp.ones_like(mean))
