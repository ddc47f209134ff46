"""Projected gradient descent (PGD) in the L-infinity ball; FGSM and BIM are special cases.

The projection is applied outside the differentiated function, because a clamp inside it would have a zero gradient at
saturated pixels. Every image stays in [0, 1].
"""

from collections.abc import Callable
from typing import Literal

from array_api_compat import array_namespace, device

from mpdsgr_deploy.protocols import Array, Differentiable

Keep = Literal["last", "broken", "worst"]
Draw = Callable[[tuple[int, ...]], Array]  # from a shape to uniform values in [-1, 1], in the images' array type


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
    """Return adversarial images for x [B, C, H, W] in [0, 1] with classes y [B], after `steps` signed steps of `step`.

    draw: gives the random start, x plus eps times its values; None starts at x.
    keep: which iterate is returned.
        "last": the last one.
        "broken": the first one that fools the target, since a later step may undo that; the last one if none does. An
        image leaves the batch once it fools the target. This takes one more evaluation at most, and far fewer if many
        images are broken.
        "worst": the one of the largest loss. It is meant for stochastic targets, where the first iterate that fools
        some draws of the noise need not fool others.
    restarts: number of runs, each from another start. With "last" and "broken", later runs leave out images that an
    earlier run broke; "worst" takes the largest loss of all runs. All starts are drawn in advance, so that an image's
    starts do not depend on the other images.

    Raises ValueError for several restarts without `draw`, because all would start at x.
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

    It calls the `clip` method of the arrays, because array_api_compat's `clip` for numpy takes several times as long on
    small images.
    """
    return (x + (images - x).clip(-eps, eps)).clip(0.0, 1.0)


def begin(x: Array, eps: float, draw: Draw | None) -> Array:
    """Return the start of an attack on x: a random point in its eps ball or, without a draw, x itself."""
    return x if draw is None else project(x + eps * draw(x.shape), x, eps)


def fixed(offsets: Array | None, rows: Array) -> Draw | None:
    """Return a draw that yields the `rows` of offsets in [-1, 1] drawn before; None without any."""
    if offsets is None:
        return None
    chosen = offsets[rows]
    return lambda shape: chosen


def wide(per_image: Array) -> Array:
    """Reshape [B] to [B, 1, 1, 1]."""
    return per_image[:, None, None, None]


def still_right(xp: Array, logits: Array, y: Array) -> Array:
    """Return whether logits [B, K] classify each image correctly [B].

    y: the classes [B], or pairs [B, 2] of the true class and a class aimed at.
    """
    return xp.argmax(logits, axis=1) == (y if y.ndim == 1 else y[:, 0])


def _last(
    xp: Array, target: Differentiable, start: Array, x: Array, y: Array, eps: float, step: float, steps: int
) -> Array:
    adversarial = start
    for _ in range(steps):
        adversarial = project(adversarial + step * xp.sign(target(adversarial, y).gradient), x, eps)
    return adversarial


def _until_broken(
    xp: Array, target: Differentiable, start: Array, x: Array, y: Array, eps: float, step: float, steps: int
) -> tuple[Array, Array]:
    """Run PGD from `start`, stopping each image at its first iterate that fools the target.

    Returns the images, and whether each image never fooled the target [B].
    """
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
    """Return each image's iterate of the largest loss over the PGD runs from all `starts`."""
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
