"""The backward pass of jumps: a surrogate replaces the derivative."""

from collections.abc import Sequence

import onnx
from onnx import TensorProto

from mpdsgr_deploy.attack_graph.adaptive import adaptive_slopes, potential_slopes
from mpdsgr_deploy.attack_graph.jumps import Jump
from mpdsgr_deploy.attack_graph.layers import Layers
from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.surrogates import ADAPTIVE, ATTACK_ONLY, AVERAGED, PDSG, RATE, STRAIGHT, Nodes, surrogate_nodes


class Neurons:
    """The rule of every node that jumps, for one kind of surrogate.

    detached: resets pass no gradient, as in libraries that detach them; either choice may give the stronger attack.
    averaged: the gradient of every step's current is the mean over steps t of

        dL/dO[t] dO/dU(U[t] - V_th)

    and nothing passes through membrane, leak or reset (HART; Hao et al., ICLR 2024, "Threaten Spiking Neural Networks
    through Combining Rate and Temporal Information"). The wider the surrogate, the more this gradient depends on firing
    rates alone.
    """

    def __init__(
        self, tape: Tape, jumps: Sequence[Jump], layers: Layers, kind: str, *, detached: bool, averaged: bool
    ) -> None:
        self._tape, self._kind, self._nodes, self._detached = tape, kind, Nodes(tape), detached
        # a layer whose first axis is not the images has no state per image; it uses the arctan surrogate instead
        self._derivative = surrogate_nodes("arctan" if kind in ATTACK_ONLY else kind)
        self._jumps = {jump.node.output[0]: jump for jump in jumps}
        self._layers = layers.steps
        self._place = {  # name of the spikes -> layer and step
            jump.node.output[0]: (layer, t)
            for layer, steps in layers.steps.items()
            for t, step in enumerate(steps)
            for jump in step
        }
        self._slopes: dict[str, str] = {}  # by jump: slopes that several jumps share, or that adapt to potentials
        if kind in (ADAPTIVE, PDSG):
            for layer, steps in self._layers.items():
                self._adapt(layer, steps)
        self._pools = averaged or kind == RATE  # whether all steps of a layer pass on the mean of their gradients
        self._waiting: dict[str, list[str]] = {}  # by layer: gradients of its steps that are not passed on yet
        if detached:
            tape.unpaid |= layers.resets

    def _adapt(self, layer: str, steps: Sequence[list[Jump]]) -> None:
        shape = self._tape.shape(steps[0][0].node.output[0])
        if not shape or shape[0] != self._tape.shape(self._tape.source)[0]:
            return
        vs = [self._v(step[0]) for step in steps]
        if self._kind == PDSG:
            slopes = potential_slopes(self._tape, vs, shape)
        else:
            slopes = adaptive_slopes(self._tape, layer, vs, shape)
        for step, slope in zip(steps, slopes, strict=True):
            self._slopes |= dict.fromkeys((jump.node.output[0] for jump in step), slope)

    def __contains__(self, node: onnx.NodeProto) -> bool:
        return node.output[0] in self._jumps

    def __call__(self, node: onnx.NodeProto, cotangent: str) -> None:
        """Pass the node's cotangent on to the values it compares, or to the currents where steps are pooled."""
        jump = self._jumps[node.output[0]]
        place = self._place.get(node.output[0])
        if jump.size == "branches":
            self._branches(jump, cotangent)
        elif self._pools and place is not None:
            own = cotangent if self._kind == RATE else self._tape.emit("Mul", cotangent, self._slope(jump))
            self._waiting.setdefault(place[0], []).append(own)
        else:
            self._give(jump, self._sized(jump, cotangent), node.output[0])

    def _sized(self, jump: Jump, cotangent: str) -> str:
        if jump.size == "one":
            return cotangent
        if jump.size == "two":
            return self._tape.emit("Mul", cotangent, self._tape.constant(2))
        _, yes, no = jump.node.input
        high, low = self._tape.array(yes), self._tape.array(no)
        assert high is not None  # otherwise this is a jump between branches
        assert low is not None
        return self._tape.emit("Mul", cotangent, self._tape.constant(high.astype("f4") - low.astype("f4")))

    def _give(self, jump: Jump, cotangent: str, like: str) -> None:
        """Pass the cotangent of a jump of size 1, of the shape of value `like`, on to what is compared."""
        tape, (above, below, passes) = self._tape, jump.compared
        if not passes and self._kind != STRAIGHT:
            cotangent = tape.emit("Mul", cotangent, self._slope(jump))
        for value, sign in ((above, 1), (below, -1)):
            if value is not None and tape.depends(value):
                tape.give(value, tape.unbroadcast(cotangent, value, like), sign)

    def _slope(self, jump: Jump) -> str:
        key = jump.node.output[0]
        if key in self._slopes:
            return self._slopes[key]
        slope = self._derivative(self._nodes, self._v(jump))
        place = self._place.get(key)
        if place is not None:  # also for the other jumps at this potential, since surrogates are even
            self._slopes |= dict.fromkeys((j.node.output[0] for j in self._layers[place[0]][place[1]]), slope)
        return slope

    def _v(self, jump: Jump) -> str:
        """Append nodes for U - V_th, which the jump compares with zero."""
        above, below, _ = jump.compared
        parts = [None if value is None else self._tape.float32(value) for value in (above, below)]
        if parts[0] is None:
            assert parts[1] is not None
            return self._tape.emit("Neg", parts[1])
        return parts[0] if parts[1] is None else self._tape.emit("Sub", parts[0], parts[1])

    def _branches(self, jump: Jump, cotangent: str) -> None:
        """Differentiate a choice between two values, in them and in the compared values.

        If resets are detached, a choice passes no gradient to the compared values, as torch's `where` never does.
        """
        tape, (condition, yes, no), output = self._tape, jump.node.input, jump.node.output[0]
        choose(tape, cotangent, output, condition, yes, no)
        if not self._detached:
            difference = tape.emit("Sub", tape.float32(yes), tape.float32(no))
            share = tape.unbroadcast(tape.emit("Mul", cotangent, difference), condition, output)
            self._give(jump, share, condition)

    def before(self, node: onnx.NodeProto) -> None:
        """Pass on the pooled gradient of a layer if `node` is its first step; all nodes behind `node` must be done."""
        layer, t = self._place.get(node.output[0], ("", -1)) if node.output else ("", -1)
        if t == 0 and layer in self._waiting:
            self._pool(self._layers[layer], self._waiting.pop(layer))

    def _pool(self, steps: Sequence[list[Jump]], waiting: list[str]) -> None:
        """Pass the mean of the steps' gradients on to the current of every step.

        The surrogate `rate` multiplies the mean by [0 < mean current < V_th] / V_th, as if the neuron were the static
        activation clip(mean current / V_th, 0, 1) (rate gradient approximation attack, Bu et al., CVPR 2023). The
        current is the summand of the potential, after learned gains. This works only for networks that this package
        exported.
        """
        tape = self._tape
        potentials = [self._potential(step) for step in steps]
        currents = [potentials[0][0], *(self._current(*both) for both in zip(potentials[1:], steps[1:], strict=True))]
        distinct = list(dict.fromkeys(currents))  # only one if the current is the same at all steps
        if self._kind == RATE:
            threshold = tape.float32(potentials[0][1])
            mean = self._mean([tape.float32(current) for current in distinct], len(distinct))
            inside = tape.emit("And", tape.emit("Greater", mean, tape.constant(0)), tape.emit("Less", mean, threshold))
            responsive = tape.emit("Div", tape.emit("Cast", inside, to=TensorProto.FLOAT), threshold)
            share = tape.emit("Mul", self._mean(waiting, len(steps)), responsive)
        else:
            share = self._mean(waiting, len(steps))
        for current in distinct:
            held = currents.count(current)
            tape.give(current, share if held == 1 else tape.emit("Mul", share, tape.constant(held)))

    def _mean(self, values: list[str], count: int) -> str:
        """Append nodes for the sum of values divided by count."""
        total = values[0]
        for value in values[1:]:
            total = self._tape.emit("Add", total, value)
        return total if count == 1 else self._tape.emit("Mul", total, self._tape.constant(1 / count))

    def _potential(self, step: list[Jump]) -> tuple[str, str]:
        """Return the names of a step's membrane potential and of its constant threshold."""
        jump = step[0]
        above, below, _ = jump.compared
        if above is None or below is None or self._tape.array(below) is None or len(step) > 1:
            raise refuse(
                jump.node, f"compares in another way than networks exported here; leave rate and {AVERAGED} out"
            )
        return above, below

    def _current(self, potential: tuple[str, str], step: list[Jump]) -> str:
        """Return the summand of a potential that is the input current, not the decayed previous potential."""
        maker = self._tape.makers.get(potential[0])
        if maker is None or maker.op_type != "Add":
            raise refuse(
                step[0].node,
                f"has a membrane potential that is not the previous one plus a current; {RATE} and {AVERAGED} "
                "work only for networks that were trained and exported here",
            )
        return maker.input[1]


def choose(tape: Tape, cotangent: str, output: str, condition: str, yes: str, no: str) -> None:
    """Differentiate output = Where(condition, yes, no): pass the cotangent on to the value that was chosen."""
    zero = tape.constant(0)
    for value, parts in ((yes, (cotangent, zero)), (no, (zero, cotangent))):
        if tape.depends(value):
            tape.give(value, tape.unbroadcast(tape.emit("Where", condition, *parts), value, output))
