"""Group jumps into layers of neurons and time steps, and find the edges through which spikes reset membranes."""

from collections.abc import Sequence
from typing import NamedTuple

from mpdsgr_deploy.attack_graph.jumps import Jump
from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.onnx_files import SPIKES

# Operators of a membrane between two steps; a synapse (convolution, product, pooling) ends the search back in time
MEMBRANE = {
    *("Add", "Cast", "Clip", "Div", "Expand", "Identity", "Mul", "Neg", "Reshape", "Squeeze", "Sub", "Sum"),
    *("Unsqueeze", "Where"),
}


class Layers(NamedTuple):
    """The layers of a network.

    steps: the time steps of each layer, in order, by the layer's name; a step is the list of all jumps at one
    potential, which a library may compare twice, to fire and to reset. resets: the edges through which a spike reaches
    a later potential of its own layer, each as (first output of the node that reads the spike, the spike).
    """

    steps: dict[str, list[list[Jump]]]
    resets: set[tuple[str, str]]


def group(tape: Tape, jumps: Sequence[Jump]) -> Layers:
    """Group jumps into layers, by the names of spikes that export writes, or else by which spike resets which membrane.

    A spike whose potential is computed from an earlier spike by elementwise operations alone is a later step of the
    same layer. Jumps that select between branches (Where) belong to no layer. Raises InputError if exported names are
    out of order.
    """
    spikes = [jump for jump in jumps if jump.size != "branches" and not jump.compared.passes]
    named = [jump for jump in spikes if jump.node.output[0].startswith(SPIKES)]
    walk = _Walk(tape, spikes)
    if named:
        return Layers(_by_name(named), walk.resets)
    steps: dict[int, list[Jump]] = {}  # key: the first jump at a potential
    first: dict[tuple[str | float | None, ...], int] = {}
    for number, jump in enumerate(spikes):
        twin = first.setdefault(_potential(tape, jump), number)
        steps.setdefault(twin, []).append(jump)
    places: dict[int, tuple[int, int]] = {}  # layer and time step
    for number in steps:
        earlier = walk.previous[number]
        previous = None if earlier is None else first[_potential(tape, spikes[earlier])]
        places[number] = (number, 0) if previous is None else (places[previous][0], places[previous][1] + 1)
    layers: dict[int, list[list[Jump]]] = {}
    for number, (layer, _) in places.items():
        layers.setdefault(layer, []).append(steps[number])
    return Layers({f"neurons{n}": of_layer for n, of_layer in enumerate(layers.values())}, walk.resets)


def _potential(tape: Tape, jump: Jump) -> tuple[str | float | None, ...]:
    """Identify the two values that a jump compares. Exporters may store a threshold once for each comparison."""
    values = jump.compared[:2]
    numbers = [None if value is None else tape.scalar(value) for value in values]
    return tuple(value if number is None else number for value, number in zip(values, numbers, strict=True))


def _by_name(spikes: Sequence[Jump]) -> dict[str, list[list[Jump]]]:
    layers: dict[str, list[list[Jump]]] = {}
    for jump in spikes:
        layer, _, step = jump.node.output[0].removeprefix(SPIKES).rpartition("/")
        steps = layers.setdefault(layer, [])
        if step != str(len(steps)):
            raise refuse(jump.node, f"stands where step {len(steps)} of layer {layer} is expected; export again")
        steps.append([jump])
    return layers


class _Walk:
    """Search from each spike's potential back to the latest earlier spike, through the operations of a membrane."""

    def __init__(self, tape: Tape, spikes: Sequence[Jump]) -> None:
        self._tape = tape
        self._numbers = {jump.node.output[0]: number for number, jump in enumerate(spikes)}
        self.previous: list[int | None] = []
        self.resets: set[tuple[str, str]] = set()
        for number, jump in enumerate(spikes):
            shape = tape.shape(jump.node.output[0])
            reached = self._back(jump, number)
            same = {n: edges for n, edges in reached.items() if tape.shape(spikes[n].node.output[0]) == shape}
            self.previous.append(max(same, default=None))
            self.resets |= {edge for edges in same.values() for edge in edges}

    def _back(self, jump: Jump, number: int) -> dict[int, set[tuple[str, str]]]:
        """Return the earlier spikes that a potential is computed from, each with the edges that read it."""
        earlier: dict[int, set[tuple[str, str]]] = {}
        waiting = [value for value in jump.compared[:2] if value is not None]
        visited = set(waiting)
        while waiting:
            node = self._tape.makers.get(waiting.pop())
            if node is None or node.op_type not in MEMBRANE:
                continue
            for value in node.input:
                spike = self._numbers.get(value)
                if spike is not None and spike < number:
                    earlier.setdefault(spike, set()).add((node.output[0], value))
                elif value not in visited and self._tape.depends(value):
                    visited.add(value)
                    waiting.append(value)
        return earlier
