"""SA-PGD (Wang et al., arXiv 2512.22522): momentum and a step size per pixel, for imprecise gradients.

    m <- m / 2 + h    w <- 0.8 w + h^2 / mean(h^2)    h = gradient / mean |gradient|
    x <- project(x + eta clip(m / sqrt(w), -1, 1))

The settings are the published ones; eta starts at eps and halves at the checkpoints of APGD. SA-PGD was designed for
surrogates that adapt during the attack (ASSG, see `attack_graph.adaptive`); it passes their state from step to step.
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
    """Return adversarial images for x [B, C, H, W] in [0, 1] with classes y [B].

    An image costs at most steps + 1 gradients. draw, keep: see `apgd`.
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
        state = _with_best(xp, state, answer)
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
    """The images still under attack; every array is [B], or [B, C, H, W] for images."""

    index: Array  # position in the batch that was passed to `sa_pgd`
    x: Array
    y: Array
    current: Array
    best: Array  # the iterate of the largest loss
    largest: Array  # loss at `best`

    def only(self, chosen: Array) -> "_Progress":
        """Return the images for which `chosen` [B] is true."""
        return _Progress(*(part[chosen] for part in self))


def _with_best(xp: Array, state: _Progress, answer: Gradient) -> _Progress:
    higher = answer.loss > state.largest
    return state._replace(
        best=xp.where(wide(higher), state.current, state.best),
        largest=xp.where(higher, answer.loss, state.largest),
    )


def _mean(xp: Array, values: Array) -> Array:
    """Return each image's mean [B, 1, 1, 1] as a divisor of `values`: 1 where the mean of non-negative values is 0."""
    mean = xp.mean(values, axis=(1, 2, 3), keepdims=True)
    return xp.where(mean > 0, mean, xp.ones_like(mean))
