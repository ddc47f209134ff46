"""The attack of Carlini & Wagner in the L2 norm (arXiv 1608.04644): search the nearest image that fools a network."""

from array_api_compat import array_namespace, device

from mpdsgr_deploy.attacks.pgd import wide
from mpdsgr_deploy.protocols import Array, Differentiable

BOX = 0.999999  # keeps atanh finite at pixels 0 and 1


def cw_l2(
    margin: Differentiable,
    x: Array,
    y: Array,
    *,
    steps: int = 100,
    searches: int = 5,
    lr: float = 0.05,
    constant: float = 1.0,
) -> Array:
    """Return adversarial images near x [B, C, H, W] in [0, 1] with classes y [B]; x itself where none was found.

    margin: a Differentiable whose loss is the largest wrong logit minus the true one, so a positive loss means that
    the network is fooled. lr: learning rate of Adam. constant: first value of the weight c.

    Adam minimises |x' - x|^2 + c max(-margin, 0) over w, where x' = (1 + tanh w) / 2 keeps x' in [0, 1]. The weight c
    is searched per image in `searches` runs of `steps` steps: it is multiplied by 10 until the network is fooled, then
    found by bisection. Results lie close to the decision boundary, so a stochastic network may classify them correctly
    under other noise.
    """
    xp = array_namespace(x)
    start = xp.atanh((2 * x - 1) * BOX)
    best, distance = xp.asarray(x, copy=True), xp.full(x.shape[0], xp.inf, dtype=x.dtype, device=device(x))
    low, high = xp.zeros_like(distance), xp.full_like(distance, xp.inf)
    c = xp.full_like(distance, constant)
    for _ in range(searches):
        w, first, second = start, xp.zeros_like(x), xp.zeros_like(x)
        succeeded = xp.zeros(x.shape[0], dtype=xp.bool, device=device(x))
        for step in range(1, steps + 1):
            tanh = xp.tanh(w)
            candidate = (1 + tanh) / 2
            _, loss, gradient = margin(candidate, y)
            norm = xp.sum((candidate - x) ** 2, axis=(1, 2, 3))
            fooled = loss > 0
            succeeded = succeeded | fooled
            nearer = fooled & (norm < distance)
            best, distance = xp.where(wide(nearer), candidate, best), xp.where(nearer, norm, distance)
            slope = 2 * (candidate - x) - wide(xp.where(fooled, xp.zeros_like(c), c)) * gradient
            slope = slope * (1 - tanh**2) / 2
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            w = w - lr * (first / (1 - 0.9**step)) / (xp.sqrt(second / (1 - 0.999**step)) + 1e-8)
        high, low = xp.where(succeeded, c, high), xp.where(succeeded, low, c)
        c = xp.where(xp.isinf(high), c * 10, (low + xp.where(xp.isinf(high), low, high)) / 2)
    return best
