"""PDSG (Lun et al., CVPR 2025, arXiv 2503.03272): a Gaussian surrogate as wide as a channel's potentials spread.

    dO/dU[t] = exp(-(v - s/2)^2 / (2 s^2)) / (sqrt(2 pi) s)            with v = U[t] - V_th

s is the standard deviation of the channel's potentials U[1..t] of one image, over places and time steps (divided by the
number of values less one), and 1 where they are all equal. Layers without places are one channel. The paper takes it
over the batch as well; its sparse attack has one image in a batch, so that images do not depend on each other here.
"""

from collections.abc import Sequence
from math import pi, prod, sqrt

from mpdsgr_deploy.attack_graph.tape import Tape


def potential_slopes(tape: Tape, vs: Sequence[str], shape: tuple[int | str | None, ...]) -> list[str]:
    """Return dO/dU of each step of a layer from its v [B, C, ...] or [B, N], of the shape `shape`."""
    first = 2 if len(shape) > 2 else 1  # of the axes over which a channel extends
    axes = tape.integers(*range(first, len(shape)))
    extents = [extent for extent in shape[first:] if isinstance(extent, int)]
    assert len(extents) == len(shape) - first
    size = prod(extents)
    sums: list[str] = []  # of v, up to each step, [B, C, 1, ...] or [B, 1]
    slopes = []
    for t, v in enumerate(vs):
        total = tape.emit("ReduceSum", v, axes, keepdims=1)
        sums.append(total if not sums else tape.emit("Add", sums[-1], total))
        count = (t + 1) * size
        mean = tape.emit("Mul", sums[-1], tape.constant(1 / count))
        squares = [
            tape.emit("ReduceSum", tape.emit("Mul", centred, centred), axes, keepdims=1)
            for centred in (tape.emit("Sub", earlier, mean) for earlier in vs[: t + 1])
        ]
        square = squares[0] if t == 0 else tape.emit("Sum", *squares)
        std = tape.emit("Sqrt", tape.emit("Mul", square, tape.constant(1 / max(count - 1, 1))))
        spread = tape.emit("Where", tape.emit("Equal", std, tape.constant(0)), tape.constant(1), std)
        slopes.append(_gaussian(tape, tape.emit("Div", v, spread), spread))
    return slopes


def _gaussian(tape: Tape, ratio: str, spread: str) -> str:
    """exp(-(r - 1/2)^2 / 2) / (sqrt(2 pi) s) of r = v / s."""
    distance = tape.emit("Sub", ratio, tape.constant(0.5))
    power = tape.emit("Mul", tape.emit("Mul", distance, distance), tape.constant(-0.5))
    return tape.emit("Div", tape.emit("Exp", power), tape.emit("Mul", spread, tape.constant(sqrt(2 * pi))))
