"""Find out which nodes of a network an attack can differentiate, before a bundle is written."""

from collections import Counter
from typing import Literal, NamedTuple

import onnx

from mpdsgr_deploy.attack_graph.derive import attack_graph, inlined
from mpdsgr_deploy.attack_graph.jumps import Jump, find_jumps, values_read
from mpdsgr_deploy.attack_graph.layers import group
from mpdsgr_deploy.attack_graph.rules import RULES
from mpdsgr_deploy.attack_graph.tape import Tape, UnsupportedNode
from mpdsgr_deploy.errors import InputError

Status = Literal["faithful", "approximate", "unsupported"]
ROUNDED = {"QuantizeLinear", "DequantizeLinear"}
# the reason why a jump is approximate, by `Jump.size`
STANDS_FOR = {
    "one": "spikes, through the surrogate",
    "two": "a sign, through the surrogate",
    "constants": "spikes, through the surrogate",
    "branches": "a choice, whose jump passes through the surrogate",
}


class NodeFinding(NamedTuple):
    """A node between images and logits: its name, its operator, how an attack differentiates it, and why so."""

    node: str
    operator: str
    status: Status
    why: str


class Survey(NamedTuple):
    """All nodes that an attack differentiates.

    spikes: the number of nodes that compute spikes; layers: the time steps of each layer of neurons; resets: the number
    of spikes that reset a membrane; refused: why no attack graph can be derived, or "" if one can.
    """

    findings: list[NodeFinding]
    spikes: int
    layers: dict[str, int]
    resets: int
    refused: str

    @property
    def steps(self) -> int:
        """The number of time steps of the layer that has the most; 1 for a network without spikes."""
        return max(self.layers.values(), default=1)

    def counts(self) -> Counter[str]:
        """Return the numbers of faithful, approximate and unsupported nodes."""
        return Counter(finding.status for finding in self.findings)


def survey(network: onnx.ModelProto, surrogate: str) -> Survey:
    """Classify the nodes of a network by how an attack through this surrogate differentiates them.

    Raises InputError for an unknown surrogate.
    """
    network = inlined(network)
    tape = Tape(network, network.graph.input[0].name)
    refused: InputError | None = None
    jumps: list[Jump] = []
    try:
        jumps = find_jumps(tape)
        attack_graph(network, surrogate)
    except InputError as error:
        refused = error
    if not jumps and refused is not None:
        where = (refused.node, refused.operator) if isinstance(refused, UnsupportedNode) else (network.graph.name, "")
        return Survey([NodeFinding(*where, "unsupported", str(refused))], 0, {}, 0, str(refused))
    layers = group(tape, jumps)
    jump_of_output = {jump.node.output[0]: jump for jump in jumps}
    needed = _needed(network)
    findings = [
        _finding(node, jump_of_output.get(node.output[0]), refused)
        for node in network.graph.node
        if node.output[0] in needed and any(tape.depends(name) for name in node.output)
    ]
    spikes = sum(jump.size != "branches" and not jump.compared.passes for jump in jumps)
    steps = {name: len(times) for name, times in layers.steps.items()}
    return Survey(findings, spikes, steps, len(layers.resets), "" if refused is None else str(refused))


def _needed(network: onnx.ModelProto) -> set[str]:
    """Return the names of all values from which the logits are computed."""
    needed = {network.graph.output[0].name}
    for node in reversed(network.graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(values_read(node))
    return needed


def _finding(node: onnx.NodeProto, jump: Jump | None, refused: InputError | None) -> NodeFinding:
    name = node.name or node.output[0]
    if isinstance(refused, UnsupportedNode) and refused.node == name:
        return NodeFinding(name, node.op_type, "unsupported", str(refused))
    if jump is None and node.op_type not in RULES:
        return NodeFinding(name, node.op_type, "unsupported", "is an operator without a rule for its gradient")
    if jump is not None:
        return NodeFinding(name, node.op_type, "approximate", STANDS_FOR[jump.size])
    if node.op_type in ROUNDED:
        return NodeFinding(name, node.op_type, "approximate", "rounding, taken for the identity")
    return NodeFinding(name, node.op_type, "faithful", "")
