"""Surrogates that adapt to membrane potentials U: ASSG and PDSG.

ASSG (arXiv 2512.22522) is an arctangent surrogate with a sharpness s per neuron, time step and image.

    M <- 0.9 M + 0.1 |v|             D <- 0.9 D + 0.1 ||v| - M|
    s = A / (M + 1.5 D + 1e-4)       dO/dU = (s / 2) / (1 + (pi s v / 2)^2)

with v = U - V_th and A = (2 / pi) tan(0.4 pi). M and D start at 1 and 0 and are updated at every evaluation of an
attack. They are the graph's inputs `mean/LAYER` and `deviation/LAYER` [batch, T, ...]; their updated values are the
outputs `mean/LAYER/new` and `deviation/LAYER/new`. The first axis is the images, so an attack may drop images between
evaluations.

PDSG (Lun et al., CVPR 2025, arXiv 2503.03272) is a Gaussian surrogate with the standard deviation of a channel's
potentials.

    dO/dU[t] = exp(-(v - s/2)^2 / (2 s^2)) / (sqrt(2 pi) s)

s is the standard deviation of the channel's potentials U[1..t] of one image, over pixels and time steps (with the
number of values minus one as the divisor), and 1 if all are equal. A fully connected layer counts as one channel. The
paper takes s over the batch as well, but its sparse attack uses batches of one image; here the images of a batch are
independent.
"""

from collections.abc import Sequence
from math import pi, prod, sqrt

from onnx import TensorProto, helper

from mpdsgr_deploy.attack_graph.tape import Tape
from mpdsgr_deploy.onnx_files import DEVIATION, MEAN, NEW
from mpdsgr_deploy.surrogates import FLOOR, MEMORY, RELAXATION, SHARPNESS


def adaptive_slopes(tape: Tape, layer: str, vs: Sequence[str], shape: tuple[int | str | None, ...]) -> list[str]:
    """Append nodes for ASSG: return dO/dU [B, ...] of each step of a layer, and declare and update the layer's state.

    vs: v = U - V_th of each step, of shape `shape`.
    """
    batch, *neurons = shape
    for prefix in (MEAN, DEVIATION):
        kind = TensorProto.FLOAT, [batch, len(vs), *neurons]
        tape.graph.input.append(helper.make_tensor_value_info(f"{prefix}{layer}", *kind))
        tape.graph.output.append(helper.make_tensor_value_info(f"{prefix}{layer}{NEW}", *kind))
    v = tape.emit("Concat", *(tape.emit("Unsqueeze", v, tape.integers(1)) for v in vs), axis=1)  # [B, T, ...]
    distance = tape.emit("Abs", v)
    mean = _updated(tape, f"{MEAN}{layer}", distance)
    deviation = _updated(tape, f"{DEVIATION}{layer}", tape.emit("Abs", tape.emit("Sub", distance, mean)))
    scale = tape.emit("Add", mean, tape.emit("Mul", deviation, tape.constant(RELAXATION)))
    sharpness = tape.emit("Div", tape.constant(SHARPNESS), tape.emit("Add", scale, tape.constant(FLOOR)))
    angle = tape.emit("Mul", tape.emit("Mul", sharpness, v), tape.constant(pi / 2))
    below = tape.emit("Add", tape.emit("Mul", angle, angle), tape.constant(1))
    slopes = tape.emit("Mul", tape.emit("Div", sharpness, below), tape.constant(0.5))
    parts = tape.split(slopes, [1] * len(vs), 1)
    return [tape.emit("Squeeze", part, tape.integers(1)) for part in parts]


def _updated(tape: Tape, state: str, value: str) -> str:
    old, new = tape.emit("Mul", state, tape.constant(MEMORY)), tape.emit("Mul", value, tape.constant(1 - MEMORY))
    return tape.emit("Add", old, new, name=f"{state}{NEW}")


def potential_slopes(tape: Tape, vs: Sequence[str], shape: tuple[int | str | None, ...]) -> list[str]:
    """Append nodes for PDSG: return dO/dU of each step of a layer.

    vs: v = U - V_th of each step, [B, C, ...] or [B, N], of shape `shape`.
    """
    first = 2 if len(shape) > 2 else 1  # the first axis over which a channel extends
    axes = tape.integers(*range(first, len(shape)))
    extents = [extent for extent in shape[first:] if isinstance(extent, int)]
    assert len(extents) == len(shape) - first
    size = prod(extents)
    sums: list[str] = []  # sums of v up to each step, each [B, C, 1, ...] or [B, 1]
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
    """Append nodes for exp(-(r - 1/2)^2 / 2) / (sqrt(2 pi) s), where `ratio` is r = v / s and `spread` is s."""
    distance = tape.emit("Sub", ratio, tape.constant(0.5))
    power = tape.emit("Mul", tape.emit("Mul", distance, distance), tape.constant(-0.5))
    return tape.emit("Div", tape.emit("Exp", power), tape.emit("Mul", spread, tape.constant(sqrt(2 * pi))))
