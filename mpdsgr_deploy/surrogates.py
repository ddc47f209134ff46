"""Surrogate gradients, which replace dO/dU of the spike O = [U >= V_th] in the backward pass. Torch is not needed.

A surrogate is named "KIND" or "KIND:WIDTH", for example "triangle:0.5". Each kind has a derivative of v = U - V_th on
the array API (for training and attacks through torch), and the same formula as ONNX nodes (for attacks on deployed
networks) and as a line of the GPU kernels. Tests check that the three agree.

Another package adds a kind, a `SurrogateKind`, through an entry point of the group "mpdsgr_deploy.surrogates". A kind
without `nodes` can be trained with, but has no attack graph; a kind without `kernel` is computed by torch operations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from array_api_compat import array_namespace
from onnx import TensorProto

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.onnx_files import WIDTH
from mpdsgr_deploy.protocols import Array
from mpdsgr_deploy.registry import Expected, Registry

if TYPE_CHECKING:
    from mpdsgr_deploy.recipe import Recipe

# Kinds without a width, which only attackers use: dO/dU = 1; the derivative of a static activation of the mean current;
# a sharpness per neuron; and a width per channel. See `neurons` and `adaptive` in `mpdsgr_deploy.attack_graph`.
STRAIGHT, RATE, ADAPTIVE, PDSG = "straight-through", "rate", "adaptive", "pdsg"
ATTACK_ONLY = (STRAIGHT, RATE, ADAPTIVE, PDSG)
DETACHED = "+detached"  # suffix that says that no gradient passes through resets
AVERAGED = "+averaged"  # suffix that says that each step gets the mean gradient of all steps (HART)
# Constants of `adaptive` (ASSG, arXiv 2512.22522), with the authors' values; 0.4 is the share of the gradient that may
# vanish
MEMORY, RELAXATION, FLOOR = 0.9, 1.5, 1e-4
SHARPNESS = 2 / math.pi * math.tan(0.4 * math.pi)


class GraphWriter(Protocol):
    """A graph to which `Nodes` adds nodes, such as `mpdsgr_deploy.attack_graph.tape.Tape`."""

    def emit(self, op_type: str, *inputs: str, **attributes: Any) -> str: ...

    def constant(self, value: Any) -> str: ...


class Nodes:
    """Adds the nodes of a surrogate to a graph. width: name of the graph's scalar input with the surrogate's width."""

    width = WIDTH

    def __init__(self, graph: GraphWriter) -> None:
        self.emit, self.constant = graph.emit, graph.constant
        self._scalars: dict[str, str] = {}

    def once(self, key: str, make: Callable[[], str]) -> str:
        """Return the name of a scalar that depends on the width alone, which `make` adds at the first use of `key`."""
        if key not in self._scalars:
            self._scalars[key] = make()
        return self._scalars[key]

    def inverse(self) -> str:
        """Return the name of 1 / width."""
        return self.once("inverse", lambda: self.emit("Reciprocal", self.width))


@dataclass(frozen=True, kw_only=True)
class SurrogateKind:
    """A family of surrogates that differ in their width w > 0.

    derivative: a function of v, of any shape, and w, which returns dO/dU in v's shape and type.
    nodes: the same as ONNX nodes, from the name of v to the name of dO/dU; None: there is no attack graph.
    half_width: a function of w, which returns half the width of the window of v that MPD-SGR empties: the support of
        the derivative if it is finite, else the central interval that holds 95 % of the derivative's mass.
    width: the default of w. narrows: whether a larger w means a narrower window.
    kernel: the derivative in `snn.triton_kernels`, as a function of v and `parameter`; None: GPU kernels lack the kind.
    source: the paper that proposed it.
    """

    derivative: Callable[[Array, float], Array]
    half_width: Callable[[float], float]
    width: float
    nodes: Callable[[Nodes, str], str] | None = None
    narrows: bool = False
    kernel: str | None = None
    source: str = ""


def _triangle(v: Array, g: float) -> Array:
    """max(0, g - |v|) / g^2."""
    xp = array_namespace(v)
    return xp.maximum(g - xp.abs(v), 0.0) / g**2


def _triangle_nodes(nodes: Nodes, v: str) -> str:
    square = nodes.once("square", lambda: nodes.emit("Mul", nodes.inverse(), nodes.inverse()))
    return nodes.emit("Mul", nodes.emit("Relu", nodes.emit("Sub", nodes.width, nodes.emit("Abs", v))), square)


def _rectangular(v: Array, a: float) -> Array:
    """1[|v| < a/2] / a."""
    xp = array_namespace(v)
    return xp.astype(xp.abs(v) < a / 2, v.dtype) / a


def _rectangular_nodes(nodes: Nodes, v: str) -> str:
    half = nodes.once("half", lambda: nodes.emit("Mul", nodes.width, nodes.constant(0.5)))
    inside = nodes.emit("Less", nodes.emit("Abs", v), half)
    return nodes.emit("Mul", nodes.emit("Cast", inside, to=TensorProto.FLOAT), nodes.inverse())


def _sigmoid(v: Array, a: float) -> Array:
    """a s (1 - s) with s = sigmoid(a v), which is a e / (1 + e)^2 with e = exp(-|a v|)."""
    xp = array_namespace(v)
    e = xp.exp(-xp.abs(a * v))
    return a * e / (1 + e) ** 2


def _sigmoid_nodes(nodes: Nodes, v: str) -> str:
    s = nodes.emit("Sigmoid", nodes.emit("Mul", v, nodes.width))
    return nodes.emit("Mul", nodes.emit("Mul", s, nodes.emit("Sub", nodes.constant(1), s)), nodes.width)


def _superspike(v: Array, k: float) -> Array:
    """1 / (1 + k |v|)^2."""
    below = 1 + k * array_namespace(v).abs(v)
    return 1 / (below * below)


def _superspike_nodes(nodes: Nodes, v: str) -> str:
    below = nodes.emit("Add", nodes.emit("Mul", nodes.emit("Abs", v), nodes.width), nodes.constant(1))
    return nodes.emit("Reciprocal", nodes.emit("Mul", below, below))


def _exponential(v: Array, a: float) -> Array:
    """exp(-|v| / a) / (2 a)."""
    xp = array_namespace(v)
    return xp.exp(-xp.abs(v) / a) / (2 * a)


def _exponential_nodes(nodes: Nodes, v: str) -> str:
    minus = nodes.once("minus", lambda: nodes.emit("Neg", nodes.inverse()))
    height = nodes.once("height", lambda: nodes.emit("Mul", nodes.inverse(), nodes.constant(0.5)))
    return nodes.emit("Mul", nodes.emit("Exp", nodes.emit("Mul", nodes.emit("Abs", v), minus)), height)


def _arctan(v: Array, a: float) -> Array:
    """(a / 2) / (1 + (pi a v / 2)^2), the derivative of arctan(pi a v / 2) / pi + 1/2."""
    return a / 2 / (1 + (math.pi / 2 * a * v) ** 2)


def _arctan_nodes(nodes: Nodes, v: str) -> str:
    slope = nodes.once("slope", lambda: nodes.emit("Mul", nodes.width, nodes.constant(math.pi / 2)))
    peak = nodes.once("peak", lambda: nodes.emit("Mul", nodes.width, nodes.constant(0.5)))
    angle = nodes.emit("Mul", v, slope)
    return nodes.emit("Div", peak, nodes.emit("Add", nodes.emit("Mul", angle, angle), nodes.constant(1)))


KINDS: Registry[SurrogateKind] = Registry(
    "surrogate",
    "mpdsgr_deploy.surrogates",
    {
        "triangle": SurrogateKind(
            derivative=_triangle,
            nodes=_triangle_nodes,
            half_width=lambda g: g,
            width=1.0,
            kernel="tl.maximum(parameter - tl.abs(v), 0.0) / (parameter * parameter)",
            source="Deng et al., arXiv 2202.11946",
        ),
        "rectangular": SurrogateKind(
            derivative=_rectangular,
            nodes=_rectangular_nodes,
            half_width=lambda a: a / 2,
            width=1.0,
            kernel="tl.where(tl.abs(v) < parameter / 2, 1.0 / parameter, 0.0)",
            source="STBP, Wu et al., arXiv 1706.02609",
        ),
        "sigmoid": SurrogateKind(  # the mass within h is tanh(a h / 2)
            derivative=_sigmoid,
            nodes=_sigmoid_nodes,
            half_width=lambda a: 2 * math.atanh(0.95) / a,
            width=4.0,
            narrows=True,
            kernel="parameter * tl.sigmoid(parameter * v) * (1 - tl.sigmoid(parameter * v))",
        ),
        "superspike": SurrogateKind(  # the share of the mass within h is 1 - 1 / (1 + k h)
            derivative=_superspike,
            nodes=_superspike_nodes,
            half_width=lambda k: 19 / k,
            width=10.0,
            narrows=True,
            kernel="1 / ((1 + parameter * tl.abs(v)) * (1 + parameter * tl.abs(v)))",
            source="Zenke & Ganguli, arXiv 1705.11146",
        ),
        "exponential": SurrogateKind(  # the mass within h is 1 - exp(-h / a)
            derivative=_exponential,
            nodes=_exponential_nodes,
            half_width=lambda a: a * math.log(20),
            width=0.5,
            kernel="tl.exp(-tl.abs(v) / parameter) / (2 * parameter)",
            source="SLAYER, Shrestha & Orchard, arXiv 1810.08646",
        ),
        "arctan": SurrogateKind(  # the mass within h is (2 / pi) arctan(pi a h / 2); tails fall as 1 / v^2
            derivative=_arctan,
            nodes=_arctan_nodes,
            half_width=lambda a: 2 / (math.pi * a) * math.tan(0.95 * math.pi / 2),
            width=2.0,
            narrows=True,
            kernel="parameter / 2 / (1 + (HALF_PI * parameter * v) * (HALF_PI * parameter * v))",
            source="Fang et al., arXiv 2007.05785; the ATan of SpikingJelly and snnTorch, with their default width",
        ),
    },
    expected=Expected("a SurrogateKind", lambda entry: isinstance(entry, SurrogateKind)),
)


class SurrogateName(NamedTuple):
    """The parts of a surrogate's name. width: not used by kinds without a width.

    detached: no gradient passes through resets. averaged: none passes through membrane, leak or reset, and the current
    of every step gets the mean over time of (gradient of the spike) * dO/dU (HART, Hao et al., ICLR 2024).
    """

    kind: str
    width: float
    detached: bool = False
    averaged: bool = False

    def __str__(self) -> str:
        width = "" if self.kind in ATTACK_ONLY else f":{self.width:g}"
        return f"{self.kind}{width}{DETACHED if self.detached else ''}{AVERAGED if self.averaged else ''}"


def parse_surrogate(name: str) -> SurrogateName:
    """Parse KIND or KIND:WIDTH, which "+detached" or "+averaged" may follow. Without WIDTH, the width is the default.

    Raises InputError for an unknown kind, for a width that is not above 0 or that the kind does not take, and for
    "+averaged" after a kind that is not in KINDS or after "+detached".
    """
    plain = name.removesuffix(AVERAGED)
    named = plain.removesuffix(DETACHED)
    kind, colon, text = named.partition(":")
    detached, averaged = named != plain, plain != name
    if kind not in KINDS:
        choose("surrogate", dict.fromkeys([*KINDS, *ATTACK_ONLY]), kind)
    if averaged and (detached or kind not in KINDS):
        raise InputError(f"surrogate {name!r}: write {AVERAGED} after KIND or KIND:NUMBER and without {DETACHED}")
    if not colon:
        return SurrogateName(kind, KINDS[kind].width if kind in KINDS else 1.0, detached, averaged)
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if kind not in KINDS or not 0 < width < float("inf"):
        raise InputError(f"surrogate {name!r}: write KIND or KIND:NUMBER above 0, for example triangle:0.5")
    return SurrogateName(kind, width, detached, averaged)


def surrogate_nodes(kind: str) -> Callable[[Nodes, str], str]:
    """Return the `nodes` of a kind. Raises InputError for an unknown kind and for one without nodes."""
    nodes = KINDS.choose(kind).nodes
    if nodes is None:
        raise InputError(
            f"surrogate {kind!r} has no ONNX nodes, so an exported network could not be attacked through it; give "
            "its SurrogateKind `nodes`"
        )
    return nodes


def scaled(name: str, factor: float) -> str:
    """Return the surrogate with a window `factor` times as wide: "triangle:1" scaled by 0.25 is "triangle:0.25".

    Raises InputError as `parse_surrogate` does, and for a kind without a width.
    """
    parsed = parse_surrogate(name)
    width = parsed.width / factor if KINDS.choose(parsed.kind).narrows else parsed.width * factor
    return str(parsed._replace(width=width))


def trained_surrogate(recipe: "Recipe") -> str:
    """Return the surrogate that a network was trained with, with its width: "triangle:1", "arctan:2+detached"."""
    neuron = recipe.neuron
    named = parse_surrogate(neuron.surrogate)
    return str(named._replace(width=neuron.surrogate_parameter or named.width, detached=neuron.detach_reset))


def with_resets(surrogate: str, *, detached: bool) -> str:
    """Return the surrogate with or without detached resets."""
    return str(parse_surrogate(surrogate)._replace(detached=detached))


def trained_half_width(recipe: "Recipe") -> float:
    """Return half the width of the training surrogate's window of U - V_th; see `SurrogateKind.half_width`."""
    kind, width, *_ = parse_surrogate(trained_surrogate(recipe))
    return KINDS.choose(kind).half_width(width)
