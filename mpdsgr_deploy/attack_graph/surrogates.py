"""What an attacker puts in place of dO/dU of the spike O = [U >= V_th], as nodes.

A surrogate is named "KIND" or "KIND:WIDTH". Of v = U - V_th:

    triangle, rectangular, sigmoid, superspike, exponential     as in `mpdsgr_deploy.snn.surrogate`
    straight-through                                            1
    rate, adaptive                                              see `mpdsgr_deploy.attack_graph.neurons`
"""

from collections.abc import Callable
from typing import NamedTuple

from onnx import TensorProto

from mpdsgr_deploy.attack_graph.tape import Tape
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose

WIDTH = "width"  # the graph's input, and the parameter g, a, a, k or a of a surrogate
STRAIGHT, RATE, ADAPTIVE = "straight-through", "rate", "adaptive"


class Surrogate(NamedTuple):
    """A kind by name and its width."""

    kind: str
    width: float


class Scalars:
    """Scalars made of the width, computed once a pass."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._made: dict[str, str] = {}

    def __call__(self, name: str, make: Callable[[], str]) -> str:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def inverse(self) -> str:
        """1 / width."""
        return self("inverse", lambda: self._tape.emit("Reciprocal", WIDTH))


Derivative = Callable[[Tape, Scalars, str], str]  # v to dO/dU


def _triangle(tape: Tape, scalars: Scalars, v: str) -> str:
    """max(0, g - |v|) / g^2."""
    square = scalars("square", lambda: tape.emit("Mul", scalars.inverse(), scalars.inverse()))
    return tape.emit("Mul", tape.emit("Relu", tape.emit("Sub", WIDTH, tape.emit("Abs", v))), square)


def _rectangular(tape: Tape, scalars: Scalars, v: str) -> str:
    """1[|v| < a/2] / a."""
    half = scalars("half", lambda: tape.emit("Mul", WIDTH, tape.constant(0.5)))
    inside = tape.emit("Less", tape.emit("Abs", v), half)
    return tape.emit("Mul", tape.emit("Cast", inside, to=TensorProto.FLOAT), scalars.inverse())


def _sigmoid(tape: Tape, scalars: Scalars, v: str) -> str:
    """a s (1 - s), s = sigmoid(a v)."""
    s = tape.emit("Sigmoid", tape.emit("Mul", v, WIDTH))
    return tape.emit("Mul", tape.emit("Mul", s, tape.emit("Sub", tape.constant(1), s)), WIDTH)


def _superspike(tape: Tape, scalars: Scalars, v: str) -> str:
    """1 / (1 + k |v|)^2."""
    below = tape.emit("Add", tape.emit("Mul", tape.emit("Abs", v), WIDTH), tape.constant(1))
    return tape.emit("Reciprocal", tape.emit("Mul", below, below))


def _exponential(tape: Tape, scalars: Scalars, v: str) -> str:
    """exp(-|v| / a) / (2 a)."""
    minus = scalars("minus", lambda: tape.emit("Neg", scalars.inverse()))
    height = scalars("height", lambda: tape.emit("Mul", scalars.inverse(), tape.constant(0.5)))
    return tape.emit("Mul", tape.emit("Exp", tape.emit("Mul", tape.emit("Abs", v), minus)), height)


DERIVATIVES: dict[str, Derivative] = {
    "triangle": _triangle,
    "rectangular": _rectangular,
    "sigmoid": _sigmoid,
    "superspike": _superspike,
    "exponential": _exponential,
}
# the widths that names without one mean; of kinds without a width: 1, which they ignore
WIDTHS = {
    "triangle": 1.0,
    "rectangular": 1.0,
    "sigmoid": 4.0,
    "superspike": 10.0,
    "exponential": 0.5,
    STRAIGHT: 1.0,
    RATE: 1.0,
    ADAPTIVE: 1.0,
}


NARROWS = {"sigmoid", "superspike"}  # the larger their width here, the narrower their window


def scaled(name: str, factor: float) -> str:
    """The surrogate with a window `factor` times as wide: "triangle:1" scaled by 0.25 is "triangle:0.25"."""
    kind, width = parse_surrogate(name)
    return f"{kind}:{width / factor if kind in NARROWS else width * factor:g}"


def parse_surrogate(name: str) -> Surrogate:
    """ "triangle:0.5" is the triangle of half-width 0.5, "triangle" that of its default.

    Raises InputError for an unknown kind and for a width that is no number above 0 or that the kind does not have.
    """
    kind, colon, text = name.partition(":")
    width = choose("attacker's surrogate", WIDTHS, kind)
    if not colon:
        return Surrogate(kind, width)
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if kind not in DERIVATIVES or not 0 < width < float("inf"):
        raise InputError(f"attacker's surrogate {name!r}: write KIND or KIND:NUMBER above 0, for example triangle:0.5")
    return Surrogate(kind, width)
