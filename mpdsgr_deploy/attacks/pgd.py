"""Projected gradient descent in the L-infinity ball; FGSM and BIM are its special cases.

The projection stands outside the differentiated function (a clamp inside it would kill the gradient of saturated
pixels) and every image stays in [0, 1].
"""

from collections.abc import Callable

from array_api_compat import array_namespace

from mpdsgr_deploy.protocols import Array, Differentiable

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
    keep_broken: bool = False,
) -> Array:
    """Adversarial images for x [B, C, H, W] in [0, 1] with classes y [B]: `steps` signed ascents of size `step`.

    draw: where the random start comes from, eps times its values; None starts at x.
    keep_broken: return the first iterate that fools the target, for images where any does, instead of the last
    iterate: the strong setting (a later step may undo what an earlier one achieved). Costs one more evaluation.
    Source: Madry et al., arXiv 1706.06083.
    """
    xp = array_namespace(x)

    def project(moved: Array) -> Array:
        return xp.clip(x + xp.clip(moved - x, -eps, eps), 0.0, 1.0)

    adversarial = x if draw is None else project(x + eps * draw(x.shape))
    broken = xp.zeros(y.shape, dtype=xp.bool)
    found = x
    for _ in range(steps):
        logits, _, gradient = target(adversarial, y)
        if keep_broken:
            found, broken = _remember(xp, found, broken, adversarial, logits, y)
        adversarial = project(adversarial + step * xp.sign(gradient))
    if not keep_broken:
        return adversarial
    found, broken = _remember(xp, found, broken, adversarial, target(adversarial, y).logits, y)
    return xp.where(broken[:, None, None, None], found, adversarial)


def _remember(xp: Array, found: Array, broken: Array, x: Array, logits: Array, y: Array) -> tuple[Array, Array]:
    fooled = xp.argmax(logits, axis=1) != y
    new = fooled & ~broken
    return xp.where(new[:, None, None, None], x, found), broken | fooled


def bim(target: Differentiable, x: Array, y: Array, *, eps: float, step: float, steps: int) -> Array:
    """Basic iterative method: PGD from x itself (Kurakin et al., arXiv 1607.02533)."""
    return pgd(target, x, y, eps=eps, step=step, steps=steps)


def fgsm(target: Differentiable, x: Array, y: Array, *, eps: float) -> Array:
    """Fast gradient sign method: one step of eps (Goodfellow et al., arXiv 1412.6572)."""
    return pgd(target, x, y, eps=eps, step=eps, steps=1)
