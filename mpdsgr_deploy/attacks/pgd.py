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
    restarts: int = 1,
) -> Array:
    """Adversarial images for x [B, C, H, W] in [0, 1] with classes y [B]: `steps` signed ascents of size `step`.

    draw: where the random start comes from, eps times its values; None starts at x.
    keep: which iterate is returned. "last"; or, since a later step may undo what an earlier one achieved, "broken": the
    first that fools the target, for images where any does (they leave the batch, so it costs one evaluation more at
    most and far fewer on a network that breaks); or "worst": the one of the largest loss. That is for stochastic
    targets, where the first to fool some draws of the noise need not fool others.
    restarts: how often all this is done, each time from another start. An image that one of them broke is left alone by
    those after it; "worst" breaks nothing, but takes the largest loss of all. The starts of every image are drawn
    beforehand, so that they depend on no other image's fate. Raises ValueError if there is no `draw` to tell several
    restarts apart.
    Source: Madry et al., arXiv 1706.06083.
    """
    xp = array_namespace(x)
    if restarts > 1 and draw is None:
        raise ValueError("restarts without a draw would all start at x; give one")
    starts = [begin(x, eps, draw) for _ in range(restarts)]
    if keep == "worst":
        return _largest_loss(xp, target, starts, x, y, eps, step, steps)
    adversarial = xp.asarray(x, copy=True)
    active = xp.arange(x.shape[0], device=device(x))  # images not broken yet
    for number, start in enumerate(starts):
        chosen, classes = x[active], y[active]
        if keep == "broken":
            adversarial[active], standing = _until_broken(xp, target, start[active], chosen, classes, eps, step, steps)
        else:
            adversarial[active] = last = _last(xp, target, start[active], chosen, classes, eps, step, steps)
            if number == restarts - 1:
                break  # without asking whether it broke: nothing follows
            standing = xp.argmax(target(last, classes).logits, axis=1) == classes
        active = active[standing]
        if not active.shape[0]:
            break
    return adversarial


def project(images: Array, x: Array, eps: float | Array) -> Array:
    """Return the nearest point to `images` that is in [0, 1] and within eps of x.

    By the arrays' own `clip`: the array API's for numpy takes several times as long on small images.
    """
    return (x + (images - x).clip(-eps, eps)).clip(0.0, 1.0)


def begin(x: Array, eps: float, draw: Draw | None) -> Array:
    """Return the start of an attack on x: a random point in its ball or, without a draw, x itself."""
    return x if draw is None else project(x + eps * draw(x.shape), x, eps)


def wide(per_image: Array) -> Array:
    """Reshape [B] to [B, 1, 1, 1]."""
    return per_image[:, None, None, None]


def still_right(xp: Array, logits: Array, y: Array) -> Array:
    """Which images are classified correctly [B]: logits [B, K]; y [B] classes, or pairs [B, 2] that begin with them."""
    return xp.argmax(logits, axis=1) == (y if y.ndim == 1 else y[:, 0])


def _last(
    xp: Array, target: Differentiable, start: Array, x: Array, y: Array, eps: float, step: float, steps: int
) -> Array:
    """PGD from `start`: its last iterate."""
    adversarial = start
    for _ in range(steps):
        adversarial = project(adversarial + step * xp.sign(target(adversarial, y).gradient), x, eps)
    return adversarial


def _until_broken(
    xp: Array, target: Differentiable, start: Array, x: Array, y: Array, eps: float, step: float, steps: int
) -> tuple[Array, Array]:
    """PGD from `start` in which each image stops at its first iterate that fools the target; which never did [B]."""
    images = xp.asarray(start, copy=True)
    active = xp.arange(x.shape[0], device=device(x))  # images not broken yet
    adversarial = start
    for number in range(steps + 1):
        logits, _, gradient = target(adversarial, y[active])
        images[active] = adversarial
        standing = xp.argmax(logits, axis=1) == y[active]
        active = active[standing]
        if number == steps or not active.shape[0]:
            break
        adversarial = project(adversarial[standing] + step * xp.sign(gradient[standing]), x[active], eps)
    never = xp.zeros(x.shape[0], dtype=xp.bool, device=device(x))
    never[active] = True
    return images, never


def _largest_loss(
    xp: Array, target: Differentiable, starts: list[Array], x: Array, y: Array, eps: float, step: float, steps: int
) -> Array:
    """PGD from each of `starts` in turn: each image's iterate of the largest loss."""
    images = xp.asarray(starts[0], copy=True)
    largest = xp.full((x.shape[0],), -xp.inf, dtype=x.dtype, device=device(x))
    for adversarial in starts:
        for number in range(steps + 1):
            _, loss, gradient = target(adversarial, y)
            higher = loss > largest
            images, largest = xp.where(wide(higher), adversarial, images), xp.where(higher, loss, largest)
            if number < steps:
                adversarial = project(adversarial + step * xp.sign(gradient), x, eps)
    return images


def bim(target: Differentiable, x: Array, y: Array, *, eps: float, step: float, steps: int) -> Array:
    """Basic iterative method: PGD from x itself (Kurakin et al., arXiv 1607.02533)."""
    return pgd(target, x, y, eps=eps, step=step, steps=steps)


def fgsm(target: Differentiable, x: Array, y: Array, *, eps: float) -> Array:
    """Fast gradient sign method: one step of eps (Goodfellow et al., arXiv 1412.6572)."""
    return pgd(target, x, y, eps=eps, step=eps, steps=1)
