"""The backward pass of spiking neurons, which are known by the names that export gives potentials and spikes."""

from typing import NamedTuple

import onnx
from onnx import TensorProto

from mpdsgr_deploy.attack_graph.adaptive import adaptive_slopes
from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.onnx_files import SPIKES
from mpdsgr_deploy.surrogates import ADAPTIVE, ATTACK_ONLY, RATE, STRAIGHT, Nodes, surrogate_nodes


class Step(NamedTuple):
    """A time step of a layer: its potential U [B, ...], the threshold V_th [] and the node that makes its spikes."""

    potential: str
    threshold: str
    node: onnx.NodeProto


class Neurons:
    """The rule of every node that makes spikes, for one kind of surrogate."""

    def __init__(self, tape: Tape, kind: str) -> None:
        self._tape, self._kind, self._nodes = tape, kind, Nodes(tape)
        self._derivative = None if kind in ATTACK_ONLY else surrogate_nodes(kind)
        self.layers: dict[str, list[Step]] = {}
        self._place: dict[str, tuple[str, int]] = {}  # spikes to layer and step
        for node in tape.forward:
            if node.op_type == "Cast" and node.output[0].startswith(SPIKES):
                self._add(node)
        self._slopes: dict[str, str] = {}  # of `adaptive`, by spikes
        if kind == ADAPTIVE:
            for layer, steps in self.layers.items():
                vs = [self._v(step) for step in steps]
                slopes = adaptive_slopes(tape, layer, vs, tape.shape(steps[0].potential))
                self._slopes |= {step.node.output[0]: slope for step, slope in zip(steps, slopes, strict=True)}
        self._waiting: dict[str, list[str]] = {}  # for `rate`: cotangents of a layer's spikes

    def _add(self, node: onnx.NodeProto) -> None:
        layer, _, step = node.output[0].removeprefix(SPIKES).rpartition("/")  # a layer's name may have slashes
        steps = self.layers.setdefault(layer, [])
        fires = self._tape.makers.get(node.input[0])
        if fires is None or fires.op_type != "GreaterOrEqual" or self._tape.array(fires.input[1]) is None:
            raise refuse(node, "does not compare a potential with a threshold")
        if step != str(len(steps)):
            raise refuse(node, f"comes where step {len(steps)} of layer {layer} is expected")
        self._place[node.output[0]] = layer, len(steps)
        steps.append(Step(fires.input[0], fires.input[1], node))

    def __contains__(self, node: onnx.NodeProto) -> bool:
        return node.output[0] in self._place

    def __call__(self, node: onnx.NodeProto, cotangent: str) -> None:
        """Give the potential, or with `rate` the currents, what follows from the spikes' cotangent."""
        layer, t = self._place[node.output[0]]
        step = self.layers[layer][t]
        if self._kind == RATE:
            self._waiting.setdefault(layer, []).append(cotangent)
        elif self._kind == STRAIGHT:
            self._tape.give(step.potential, cotangent)
        else:
            slope = self._slopes.get(node.output[0]) or self._slope(step)
            self._tape.give(step.potential, self._tape.emit("Mul", cotangent, slope))

    def _slope(self, step: Step) -> str:
        assert self._derivative is not None  # the other kinds have no slope
        return self._derivative(self._nodes, self._v(step))

    def _v(self, step: Step) -> str:
        """U - V_th."""
        return self._tape.emit("Sub", self._tape.float32(step.potential), self._tape.float32(step.threshold))

    def before(self, node: onnx.NodeProto) -> None:
        """Called when all behind a node is done: with `rate`, the time for the first step's layer to pass on."""
        if node in self and self._place[node.output[0]][1] == 0:
            layer = self._place[node.output[0]][0]
            if layer in self._waiting:
                self._rate(self.layers[layer], self._waiting.pop(layer))

    def _rate(self, steps: list[Step], waiting: list[str]) -> None:
        """mean_t(cotangent of spikes) [0 < mean current < V_th] / V_th to the current of every step alike.

        As if the neuron were the static activation clip(mean current / V_th, 0, 1); nothing passes through membrane,
        leak or reset (rate gradient approximation attack, Bu et al., CVPR 2023). A current is what the potential
        receives, behind learned gains.
        """
        tape, threshold = self._tape, self._tape.float32(steps[0].threshold)
        currents = [steps[0].potential, *(self._current(step) for step in steps[1:])]
        distinct = list(dict.fromkeys(currents))  # one, where the current lasts
        mean = self._mean([tape.float32(current) for current in distinct], len(distinct))
        inside = tape.emit("And", tape.emit("Greater", mean, tape.constant(0)), tape.emit("Less", mean, threshold))
        responsive = tape.emit("Div", tape.emit("Cast", inside, to=TensorProto.FLOAT), threshold)
        given = tape.emit("Mul", self._mean(waiting, len(steps)), responsive)
        for current in distinct:
            held = currents.count(current)
            tape.give(current, given if held == 1 else tape.emit("Mul", given, tape.constant(held)))

    def _mean(self, values: list[str], count: int) -> str:
        """The sum of values divided by count."""
        total = values[0]
        for value in values[1:]:
            total = self._tape.emit("Add", total, value)
        return total if count == 1 else self._tape.emit("Mul", total, self._tape.constant(1 / count))

    def _current(self, step: Step) -> str:
        """The summand of a potential that is not what was left of the last one."""
        made = self._tape.makers.get(step.potential)
        if made is None or made.op_type != "Add":
            raise refuse(step.node, "has a potential that is not what was left of the last one plus a current")
        return made.input[1]
