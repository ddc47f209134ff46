"""Find the jumps of a network: spikes, and every other comparison whose result depends on the image.

Whichever library defines a spiking neuron, ONNX expresses it as a comparison of a value that depends on the images,
whose result becomes a number: a Cast of `u >= V_th`, a Where with two constants, or a Sign. The derivative of such a
node is zero almost everywhere, so a surrogate replaces it. Every comparison must be found: one that is overlooked
passes no gradient, and the network would only seem robust. Any other choice between images and logits is an error.
"""

from typing import Literal, NamedTuple

import onnx
from onnx import TensorProto

from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.attack_graph.values import SHAPES

COMPARISONS = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
VIEWS = {"Dropout", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
LINEAR = VIEWS | {"Add", "Cast", "Concat", "Conv", "Div", "Gather", "Gemm", "MatMul", "Mul", "Neg", "ReduceMean"}
LINEAR |= {"ReduceSum", "Slice", "Split", "Sub", "Sum"}
UNROLL = {"If", "Loop", "Scan", "LSTM", "GRU", "RNN"}
# Operators without a useful derivative that are not comparisons with a threshold
STEPS = {
    *("And", "ArgMax", "ArgMin", "BitShift", "Ceil", "DynamicQuantizeLinear", "Equal", "Floor", "Hardmax", "IsInf"),
    *("IsNaN", "Mod", "NonZero", "Not", "OneHot", "Or", "Round", "TopK", "Unique", "Xor"),
}
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
MULTIPLE = {"Floor", "Round", "Ceil"}


class Inequality(NamedTuple):
    """The comparison above >= below or above > below, where None stands for 0.

    passes: the gradient passes straight through, because one side is a spike or noise.
    """

    above: str | None
    below: str | None
    passes: bool = False


class Jump(NamedTuple):
    """A node whose output jumps where above - below changes its sign.

    size: the height of the jump: 1 (spikes), 2 (Sign), the difference of two constants (Where), or the difference of
    two values that depend on the images themselves (a Where that selects between branches).
    """

    node: onnx.NodeProto
    compared: Inequality
    size: Literal["one", "two", "constants", "branches"]


def find_jumps(tape: Tape) -> list[Jump]:
    """Return every jump between images and logits, in node order, and mark which values of the tape have a cotangent.

    Raises InputError for a comparison, a rounding or a choice that no surrogate can replace.
    """
    finder = _Finder(tape)
    for node in tape.forward:
        finder.read(node)
    finder.refuse_overlooked()
    tape.smooth = finder.smooth
    return finder.jumps


class _Finder:
    """Find the jumps in one pass over the nodes.

    smooth: values that depend on the images through operators with a derivative or a surrogate. decided: booleans that
    result from comparing values that depend on the images; None if no surrogate can replace the comparison.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape, self.smooth, self.jumps = tape, {tape.source}, list[Jump]()
        self.decided: dict[str, Inequality | None] = {}
        self.binary: set[str] = set()  # smooth values that are 0 or 1: spikes
        self.signs: dict[str, Inequality] = {}  # smooth values that are -1, 0 or 1
        self.noise = {entry.name for entry in tape.network.graph.input[1:]}

    def read(self, node: onnx.NodeProto) -> None:
        inputs = values_read(node)
        reached = [name for name in inputs if name in self.smooth or name in self.decided]
        if node.op_type in SHAPES:
            return
        if not reached:
            if not self.noise.isdisjoint(inputs):
                self.noise.update(node.output)
        elif node.op_type in COMPARISONS:
            self.decided[node.output[0]] = self._compare(node)
        elif node.op_type == "Not" and (inner := self.decided.get(inputs[0])) is not None:
            self.decided[node.output[0]] = Inequality(inner.below, inner.above, inner.passes)
        elif node.op_type == "Identity" and inputs[0] in self.decided:
            self.decided[node.output[0]] = self.decided[inputs[0]]
        elif node.op_type == "Cast":
            self._cast(node)
        elif node.op_type == "Where" and inputs[0] in self.decided:
            self._where(node)
        elif node.op_type == "Sign":
            self.signs[node.output[0]] = Inequality(inputs[0], None)
            self._jump(node, self.signs[node.output[0]], "two")
        elif node.op_type == "Relu" and inputs[0] in self.signs:
            self._jump(node, self.signs[inputs[0]], "one")
            self.binary.add(node.output[0])
        else:
            self._other(node, inputs)

    def _compare(self, node: onnx.NodeProto) -> Inequality | None:
        above, below = node.input if node.op_type.startswith("Greater") else reversed(node.input)
        if above in self.decided or below in self.decided:
            return None
        if below in self.noise or above in self.noise:  # an encoding draws spikes with mean x as x >= noise
            return Inequality(above, below, passes=True) if below in self.noise else None
        between = self.tape.scalar(below)
        if above in self.binary and between is not None and 0 <= between <= 1:
            return Inequality(above, below, passes=True)
        return Inequality(above, below)

    def _cast(self, node: onnx.NodeProto) -> None:
        value, output = node.input[0], node.output[0]
        to = next(entry.i for entry in node.attribute if entry.name == "to")
        if value in self.decided:
            compared = self.decided[value]
            if compared is None or to == TensorProto.BOOL:
                self.decided[output] = compared
            else:
                self._jump(node, compared, "one")
                self.binary.add(output)
        elif to == TensorProto.BOOL:
            self.decided[output] = Inequality(value, None, passes=True) if value in self.binary else None
        elif to in FLOATS or value in self.binary:
            self._keep(node)
        else:
            self.decided[output] = None

    def _where(self, node: onnx.NodeProto) -> None:
        condition, yes, no = node.input
        compared = self.decided[condition]
        if compared is None or yes in self.decided or no in self.decided:
            self.decided[node.output[0]] = None
        elif yes in self.smooth or no in self.smooth:
            self.smooth.add(node.output[0])
            if not self._continuous(compared, yes, no):
                self.jumps.append(Jump(node, compared, "branches"))
        else:
            self._jump(node, compared, "constants")
            if {self.tape.scalar(yes), self.tape.scalar(no)} == {0.0, 1.0}:
                self.binary.add(node.output[0])

    def _continuous(self, compared: Inequality, yes: str, no: str) -> bool:
        """Whether both branches are equal at the threshold, as in Relu and clipping that are written with Where."""
        for value, other in ((compared.above, compared.below), (compared.below, compared.above)):
            threshold = 0.0 if other is None else self.tape.scalar(other)
            if value is not None and threshold is not None:
                return {self._at(value, branch, threshold) for branch in (yes, no)} == {threshold}
        return False

    def _at(self, compared: str, branch: str, threshold: float) -> float | None:
        """Return the value of a branch if `compared` equals the threshold; None if the graph does not determine it."""
        if branch == compared:
            return threshold
        maker = self.tape.makers.get(branch)
        if threshold == 0 and maker is not None and maker.op_type == "Mul" and compared in maker.input:
            others = [name for name in maker.input if name != compared]
            return 0.0 if len(others) == 1 and self.tape.array(others[0]) is not None else None
        return self.tape.scalar(branch)

    def _other(self, node: onnx.NodeProto, inputs: list[str]) -> None:
        decided = any(name in self.decided for name in inputs)
        after_sign = any(name in self.signs for name in inputs) and node.op_type not in LINEAR
        if decided or after_sign or node.op_type in STEPS | UNROLL or any(a.HasField("g") for a in node.attribute):
            self.decided |= dict.fromkeys(node.output)
            return
        self._keep(node)

    def _keep(self, node: onnx.NodeProto) -> None:
        """Mark the outputs of a node with a derivative as smooth, and as binary or signs if its input is."""
        self.smooth.update(node.output)
        if node.op_type in VIEWS | {"Cast"}:
            if node.input[0] in self.binary:
                self.binary.update(node.output)
            if node.input[0] in self.signs:
                self.signs |= dict.fromkeys(node.output, self.signs[node.input[0]])

    def _jump(self, node: onnx.NodeProto, compared: Inequality, size: Literal["one", "two", "constants"]) -> None:
        self.jumps.append(Jump(node, compared, size))
        self.smooth.add(node.output[0])

    def refuse_overlooked(self) -> None:
        """Raise InputError for the first value between images and logits that has no derivative and no surrogate.

        The values between them are found from the edges of the graph, so that no value counts as constant only because
        `read` does not know its operator.
        """
        needed, reached = {self.tape.network.graph.output[0].name}, {self.tape.source}
        for node in reversed(self.tape.forward):
            if node.op_type not in SHAPES and not needed.isdisjoint(node.output):
                needed.update(values_read(node))
        for node in self.tape.forward:
            if node.op_type in SHAPES or reached.isdisjoint(values_read(node)):
                continue
            reached.update(node.output)
            for output in needed.intersection(node.output) - self.smooth:
                if output and self.decided.get(output) is None:
                    raise refuse(node, why_not(node))


def values_read(node: onnx.NodeProto) -> list[str]:
    """Return the values that a node reads, including those that its subgraphs (control flow) read from outside."""
    inner = [
        name for entry in node.attribute if entry.HasField("g") for one in entry.g.node for name in values_read(one)
    ]
    return [name for name in (*node.input, *inner) if name]


def why_not(node: onnx.NodeProto) -> str:
    """Return the reason why a node without derivative and without surrogate is refused."""
    if node.op_type in UNROLL:
        return "is control flow: unroll the time steps in `forward` (a Python loop of fixed length) and export again"
    if node.op_type in MULTIPLE:
        return (
            "rounds values that depend on the images, as neurons with several spikes per step do; use neurons with "
            "at most one spike per step"
        )
    return (
        "compares values that depend on the images and has no surrogate gradient, so an attack would get no gradient "
        "through it"
    )
