"""Derivatives of elementwise operators, with broadcasting."""

from collections.abc import Callable, Sequence
from math import pi, sqrt
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from mpdsgr_deploy.attack_graph.neurons import choose
from mpdsgr_deploy.attack_graph.rules.common import Rule, only
from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.onnx_files import SPIKES, attribute


def _sum(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate Add, Sub, and Sum and Mean of any number of values."""
    cotangent = only(cotangents)
    if node.op_type == "Mean":
        cotangent = tape.emit("Mul", cotangent, tape.constant(1 / len(node.input)))
    for position, value in enumerate(node.input):
        if tape.depends(value):
            sign = -1 if node.op_type == "Sub" and position else 1
            tape.give(value, tape.unbroadcast(cotangent, value, node.output[0]), sign)


def _mul(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    for value, other in (node.input, reversed(node.input)):
        if tape.depends(value):
            product = tape.emit("Mul", only(cotangents), tape.float32(other))
            tape.give(value, tape.unbroadcast(product, value, node.output[0]))


def _div(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    above, below = node.input
    if tape.depends(above) or not tape.depends(below):
        quotient = tape.emit("Div", only(cotangents), tape.float32(below))
        tape.give(above, tape.unbroadcast(quotient, above, node.output[0]))
    if tape.depends(below):  # -(a / b) / b
        ratio = tape.emit("Div", tape.float32(node.output[0]), tape.float32(below))
        tape.give(below, tape.unbroadcast(tape.emit("Mul", only(cotangents), ratio), below, node.output[0]), -1)


def _pow(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    base, exponent = node.input
    if tape.depends(exponent):
        raise refuse(node, "has an exponent that depends on the images")
    n = tape.float32(exponent)
    lowered = tape.emit("Pow", tape.float32(base), tape.emit("Sub", n, tape.constant(1)))
    slope = tape.emit("Mul", n, lowered)
    tape.give(base, tape.unbroadcast(tape.emit("Mul", only(cotangents), slope), base, node.output[0]))


def _same(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Pass the cotangent through a change of number format, whose rounding does not depend on the images."""
    tape.give(node.input[0], only(cotangents))


def _quantize(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate QuantizeLinear: rounding as the identity, saturation as a clip.

    Quantisers express Relu by saturation. Networks that this package exported quantise only spikes, which never
    saturate.
    """
    value, cotangent = node.input[0], only(cotangents)
    exact = any(name.startswith(SPIKES) for name in tape.makers)
    if not exact and (bounds := _bounds(tape, node)) is not None:
        for bound, outside in zip(bounds, ("Less", "Greater"), strict=True):
            beyond = tape.emit(outside, tape.float32(value), tape.constant(bound))
            cotangent = tape.emit("Where", beyond, tape.constant(0), cotangent)
    tape.give(value, cotangent)


def _bounds(tape: Tape, node: onnx.NodeProto) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return the smallest and the largest value that does not saturate; None for floating-point formats."""
    scale = tape.array(node.input[1])
    zero = tape.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.uint8)
    if scale is None or zero is None:
        raise refuse(node, "quantises by a scale that is known only at run time; use static quantisation")
    if zero.dtype.kind not in "iu":
        return None
    info, offset = np.iinfo(zero.dtype), zero.astype(np.float64)
    low, high = ((bound - offset) * scale for bound in (info.min, info.max))
    if scale.ndim:
        axis, rank = attribute(node, "axis", 1), len(tape.shape(node.input[0]))
        low, high = (bound.reshape([-1 if i == axis % rank else 1 for i in range(rank)]) for bound in (low, high))
    return low, high


def _extreme(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate Max or Min of two values; where these are equal, the first one gets the cotangent."""
    if len(node.input) != 2:
        raise refuse(node, "compares more than two values")
    compare = "GreaterOrEqual" if node.op_type == "Max" else "LessOrEqual"
    first = tape.emit(compare, *map(tape.float32, node.input))
    choose(tape, only(cotangents), node.output[0], first, *node.input)


def _clip(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Pass the cotangent on where the value is within the bounds, inclusive as in torch."""
    x, cotangent = tape.float32(node.input[0]), only(cotangents)
    for position, outside in ((1, "Less"), (2, "Greater")):
        bound = node.input[position] if len(node.input) > position else ""
        if bound:
            beyond = tape.emit(outside, x, tape.float32(bound))
            cotangent = tape.emit("Where", beyond, tape.constant(0), cotangent)
    tape.give(node.input[0], cotangent)


def _where(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    choose(tape, only(cotangents), node.output[0], *node.input)


Slope = Callable[[Tape, onnx.NodeProto, str, str], str]  # from x and y, both float32, to dy/dx


def _pointwise(slope: Slope) -> Rule:
    """Make the rule of an operator y = f(x) from its derivative."""

    def rule(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
        if any(tape.depends(value) for value in node.input[1:]):
            raise refuse(node, "has a parameter that depends on the images")
        x, y = tape.float32(node.input[0]), tape.float32(node.output[0])
        tape.give(node.input[0], tape.emit("Mul", only(cotangents), slope(tape, node, x, y)))

    return rule


def _leaky_relu(tape: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    below = tape.constant(attribute(node, "alpha", 0.01))
    return tape.emit("Where", tape.emit("Greater", x, tape.constant(0)), tape.constant(1), below)


def _prelu(tape: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    above = tape.emit("Greater", x, tape.constant(0))
    return tape.emit("Where", above, tape.constant(1), tape.float32(node.input[1]))


def _elu(tape: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    alpha = tape.constant(attribute(node, "alpha", 1.0))  # below 0 the slope is y + alpha
    above = tape.emit("Greater", x, tape.constant(0))
    return tape.emit("Where", above, tape.constant(1), tape.emit("Add", y, alpha))


def _hard_sigmoid(tape: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    """Return the slope: alpha where 0 < alpha x + beta < 1, else 0."""
    inside = tape.emit("And", tape.emit("Greater", y, tape.constant(0)), tape.emit("Less", y, tape.constant(1)))
    slope = tape.constant(attribute(node, "alpha", 0.2))
    return tape.emit("Mul", tape.emit("Cast", inside, to=TensorProto.FLOAT), slope)


def _hard_swish(tape: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    """Return the slope of x clip(x / 6 + 1/2, 0, 1): 0 up to -3, 1 from 3 on, x / 3 + 1/2 between."""
    slope = tape.emit("Add", tape.emit("Mul", x, tape.constant(1 / 3)), tape.constant(0.5))
    above = tape.emit("Where", tape.emit("Less", x, tape.constant(3)), slope, tape.constant(1))
    return tape.emit("Where", tape.emit("Greater", x, tape.constant(-3)), above, tape.constant(0))


def _gaussian(tape: Tape, x: str, factor: float) -> str:
    """Append nodes for factor exp(-x^2)."""
    return tape.emit("Mul", tape.emit("Exp", tape.emit("Neg", tape.emit("Mul", x, x))), tape.constant(factor))


def _gelu(tape: Tape, node: onnx.NodeProto, x: str, y: str) -> str:
    """Return the slope Phi(x) + x phi(x).

    With approximate = "tanh", it is the derivative of x (1 + tanh(z)) / 2 with z = c (x + 0.044715 x^3).
    """
    half, one = tape.constant(0.5), tape.constant(1)
    if attribute(node, "approximate", b"none") == b"none":
        scaled = tape.emit("Mul", x, tape.constant(sqrt(0.5)))
        phi = tape.emit("Mul", tape.emit("Add", tape.emit("Erf", scaled), one), half)
        return tape.emit("Add", phi, tape.emit("Mul", x, _gaussian(tape, scaled, 1 / sqrt(2 * pi))))
    c, square = sqrt(2 / pi), tape.emit("Mul", x, x)
    cubic = tape.emit("Add", tape.emit("Mul", square, tape.constant(0.044715 * c)), tape.constant(c))
    t = tape.emit("Tanh", tape.emit("Mul", x, cubic))
    inner = tape.emit("Add", tape.emit("Mul", square, tape.constant(3 * 0.044715 * c)), tape.constant(c))
    rising = tape.emit("Mul", tape.emit("Mul", x, tape.emit("Sub", one, tape.emit("Mul", t, t))), inner)
    return tape.emit("Mul", tape.emit("Add", tape.emit("Add", one, t), rising), half)


RULES: dict[str, Rule] = {
    "Abs": _pointwise(lambda tape, node, x, y: tape.emit("Sign", x)),
    "Add": _sum,
    "Cast": _same,  # a Cast of booleans; see `jumps`
    "Clip": _clip,
    "DequantizeLinear": _same,
    "Div": _div,
    "Dropout": _same,
    "Elu": _pointwise(_elu),
    "Erf": _pointwise(lambda tape, node, x, y: _gaussian(tape, x, 2 / sqrt(pi))),
    "Exp": _pointwise(lambda tape, node, x, y: y),
    "Gelu": _pointwise(_gelu),
    "HardSigmoid": _pointwise(_hard_sigmoid),
    "HardSwish": _pointwise(_hard_swish),
    "Identity": _same,
    "LeakyRelu": _pointwise(_leaky_relu),
    "Log": _pointwise(lambda tape, node, x, y: tape.emit("Reciprocal", x)),
    "Max": _extreme,
    "Mean": _sum,
    "Min": _extreme,
    "Mul": _mul,
    "Neg": lambda tape, node, cotangents: tape.give(node.input[0], only(cotangents), -1),
    "PRelu": _pointwise(_prelu),
    "Pow": _pow,
    "QuantizeLinear": _quantize,
    "Reciprocal": _pointwise(lambda tape, node, x, y: tape.emit("Neg", tape.emit("Mul", y, y))),
    "Relu": _pointwise(
        lambda tape, node, x, y: tape.emit("Cast", tape.emit("Greater", x, tape.constant(0)), to=TensorProto.FLOAT)
    ),
    "Sigmoid": _pointwise(lambda tape, node, x, y: tape.emit("Mul", y, tape.emit("Sub", tape.constant(1), y))),
    "Softplus": _pointwise(lambda tape, node, x, y: tape.emit("Sigmoid", x)),
    "Sqrt": _pointwise(lambda tape, node, x, y: tape.emit("Div", tape.constant(0.5), y)),
    "Sub": _sum,
    "Sum": _sum,
    "Tanh": _pointwise(lambda tape, node, x, y: tape.emit("Sub", tape.constant(1), tape.emit("Mul", y, y))),
    "Where": _where,
}
