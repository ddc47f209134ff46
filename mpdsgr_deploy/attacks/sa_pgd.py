"""SA-PGD with adaptive surrogates (ASSG): steps and surrogate widths that follow the attack.

Source: Wang et al., arXiv 2512.22522, and their published settings.

    width   M <- b M + (1 - b) |v|     D <- b D + (1 - b) | |v| - M |      v = U - V_th, b = 0.9
            g = (M + 1.5 D) / A
    step    m <- m / 2 + h    w <- 0.8 w + h^2 / mean(h^2)    h = gradient / mean |gradient|
            x <- project(x + eta clip(m / sqrt(w), -1, 1))

M and D are running means per neuron, step and image, over the iterations of the attack; A bounds the share of its
reach at which a surrogate is expected to be met, so that no neuron's gradient vanishes and none is blurred more than
that takes. eta starts at eps and halves at the checkpoints of APGD.

Chosen here: the triangle carries the width, as it is the surrogate this package trains with (theirs is the arctangent).
M starts as the first distances seen, not as 1, which is no distance of any network. A width comes from the distances of
the iterates before; to use the present one's would cost another forward pass.
"""

from typing import Literal, NamedTuple

from array_api_compat import array_namespace, device

from mpdsgr_deploy.attacks.apgd import checkpoints
from mpdsgr_deploy.attacks.pgd import Draw, project
from mpdsgr_deploy.protocols import Adaptive, Array, Gradient

DECAY = 0.9  # b
SPREAD = 1.5  # of the deviation D that is added to the mean M
NARROWEST = 1e-4  # a width never falls to 0


def sa_pgd(
    target: Adaptive,
    x: Array,
    y: Array,
    *,
    eps: float,
    steps: int = 100,
    reach: float = 0.8,
    draw: Draw | None = None,
    keep: Literal["broken", "worst"] = "broken",
) -> Array:
    """Adversarial images for x [B, C, H, W] in [0, 1] with classes y [B], after steps + 1 gradients an image at most.

    reach: A, in (0, 1]. draw, keep: as of `pgd`. "broken" also drops an image from the batch as soon as it fools the
    target, and returns the iterate of the largest loss for those that never do.
    """
    xp = array_namespace(x)
    start = x if draw is None else project(xp, x + eps * draw(x.shape), x, eps)
    found = xp.asarray(start, copy=True)
    state = _State(xp.arange(x.shape[0], device=device(x)), x, y, start, start, xp.full_like(x[:, 0, 0, 0], -xp.inf))
    momentum, power = xp.zeros_like(x), xp.zeros_like(x)
    moments: list[_Moments] = []
    eta, checks = eps, checkpoints(steps)
    for number in range(steps + 1):
        widths = [moment.width(reach) for moment in moments] or None
        answer, distances = target(state.current, state.y, widths)
        state = _seen(xp, state, answer)
        moments = _updated(xp, moments, distances)
        gradient = answer.gradient
        if keep == "broken":
            found[state.index] = state.current
            standing = xp.argmax(answer.logits, axis=1) == state.y
            state, moments = state.only(standing), [moment.only(standing) for moment in moments]
            momentum, power, gradient = momentum[standing], power[standing], gradient[standing]
        if number == steps or not state.y.shape[0]:
            break
        eta = eta / 2 if number in checks else eta
        h = gradient / _mean(xp, xp.abs(gradient))
        momentum = momentum / 2 + h
        power = 0.8 * power + h**2 / _mean(xp, h**2)
        move = xp.clip(momentum / (xp.sqrt(power) + 1e-12), -1.0, 1.0)
        state = state._replace(current=project(xp, state.current + eta * move, state.x, eps))
    found[state.index] = state.best
    return found


class _State(NamedTuple):
    """The images still under attack; [B] or [B, C, H, W]."""

    index: Array  # place in the batch that was handed in
    x: Array
    y: Array
    current: Array
    best: Array  # where the loss was largest
    largest: Array

    def only(self, chosen: Array) -> "_State":
        """The images where `chosen` [B]."""
        return _State(*(part[chosen] for part in self))


class _Moments(NamedTuple):
    """Running mean and deviation of a layer's distances [B, T, ...]."""

    mean: Array
    deviation: Array

    def width(self, reach: float) -> Array:
        return (self.mean + SPREAD * self.deviation + NARROWEST) / reach

    def only(self, chosen: Array) -> "_Moments":
        """Of the images where `chosen` [B]."""
        return _Moments(*(part[chosen] for part in self))


def _seen(xp: Array, state: _State, answer: Gradient) -> _State:
    higher = answer.loss > state.largest
    return state._replace(
        best=xp.where(higher[:, None, None, None], state.current, state.best),
        largest=xp.where(higher, answer.loss, state.largest),
    )


def _updated(xp: Array, moments: list[_Moments], distances: list[Array]) -> list[_Moments]:
    if not moments:
        return [_Moments(distance, xp.zeros_like(distance)) for distance in distances]
    found = []
    for (mean, deviation), distance in zip(moments, distances, strict=True):
        mean = DECAY * mean + (1 - DECAY) * distance
        found.append(_Moments(mean, DECAY * deviation + (1 - DECAY) * xp.abs(distance - mean)))
    return found


def _mean(xp: Array, values: Array) -> Array:
    """Of each image, [B, 1, 1, 1]; 1 where it is 0, since what is divided by it is 0 there as well."""
    mean = xp.mean(values, axis=(1, 2, 3), keepdims=True)
    return xp.where(mean > 0, mean, xp.ones_like(mean))
