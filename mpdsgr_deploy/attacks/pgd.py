"""Projected gradient descent in the L-infinity ball; FGSM and BIM are its special cases.

The projection stands outside the differentiated function (a clamp inside it would kill the gradient of saturated
pixels) and every image stays in [0, 1].
"""

from collections.abc import Callable
from typing import Literal

from array_api_compat import array_namespace, device

from mpdsgr_deploy.protocols import Array, Differentiable

Keep = Literal["last", "broken", "worst"]
Draw = Callable[[tuple[int, ...]], Array]  # a shape to values uniform in [-1, 1], of the same kind as the images


def pgd(
    target: Differentiable,
    x: Array,
    y: Array,
    *,
    eps: float,
    step: float,
    steps: int,
    draw: Draw | None = None,
    keep: Keep = "last",
) -> Array:
    """Adversarial images for x [B, C, H, W] in [0, 1] with classes y [B]: `steps` signed ascents of size `step`.

    draw: where the random start comes from, eps times its values; None starts at x.
    keep: which iterate is returned. "last"; or, since a later step may undo what an earlier one achieved, "broken": the
    first that fools the target, for images where any does (they leave the batch, so it costs one evaluation more at
    most and far fewer on a network that breaks); or "worst": the one of the largest loss. That is for stochastic
    targets, where the first to fool some draws of the noise need not fool others.
    Source: Madry et al., arXiv 1706.06083.
    """
    xp = array_namespace(x)
    adversarial = x if draw is None else _project(xp, x + eps * draw(x.shape), x, eps)
    if keep == "broken":
        return _until_broken(xp, target, adversarial, x, y, eps, step, steps)
    if keep == "worst":
        return _largest_loss(xp, target, adversarial, x, y, eps, step, steps)
    for _ in range(steps):
        adversarial = _project(xp, adversarial + step * xp.sign(target(adversarial, y).gradient), x, eps)
    return adversarial


def _project(xp: Array, moved: Array, x: Array, eps: float) -> Array:
    """The nearest point to `moved` that is in [0, 1] and within eps of x."""
    return xp.clip(x + xp.clip(moved - x, -eps, eps), 0.0, 1.0)


def _until_broken(
    xp: Array, target: Differentiable, start: Array, x: Array, y: Array, eps: float, step: float, steps: int
) -> Array:
    """PGD from `start` in which each image stops at its first iterate that fools the target."""
    found = xp.asarray(start, copy=True)
    active = xp.arange(x.shape[0], device=device(x))  # images not broken yet
    adversarial = start
    for number in range(steps + 1):
        logits, _, gradient = target(adversarial, y[active])
        found[active] = adversarial
        standing = xp.argmax(logits, axis=1) == y[active]
        active = active[standing]
        if number == steps or not active.shape[0]:
            break
        adversarial = _project(xp, adversarial[standing] + step * xp.sign(gradient[standing]), x[active], eps)
    return found


def _largest_loss(
    xp: Array, target: Differentiable, start: Array, x: Array, y: Array, eps: float, step: float, steps: int
) -> Array:
    """PGD from `start` that returns each image's iterate of the largest loss."""
    found = xp.asarray(start, copy=True)
    largest = xp.full((x.shape[0],), -xp.inf, dtype=x.dtype, device=device(x))
    adversarial = start
    for number in range(steps + 1):
        _, loss, gradient = target(adversarial, y)
        higher = loss > largest
        found, largest = xp.where(higher[:, None, None, None], adversarial, found), xp.where(higher, loss, largest)
        if number < steps:
            adversarial = _project(xp, adversarial + step * xp.sign(gradient), x, eps)
    return found


def bim(target: Differentiable, x: Array, y: Array, *, eps: float, step: float, steps: int) -> Array:
    """Basic iterative method: PGD from x itself (Kurakin et al., arXiv 1607.02533)."""
    return pgd(target, x, y, eps=eps, step=step, steps=steps)


def fgsm(target: Differentiable, x: Array, y: Array, *, eps: float) -> Array:
    """Fast gradient sign method: one step of eps (Goodfellow et al., arXiv 1412.6572)."""
    return pgd(target, x, y, eps=eps, step=eps, steps=1)
