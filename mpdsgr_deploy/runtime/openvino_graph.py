"""Exact rewrites of a network for OpenVINO, applied each time a file is loaded; the bundle's file is not changed.

They reduce the work besides the products: neurons in fewer operations, spikes as bytes also when they are pooled, and
time steps split without copies. Logits are the same to the bit as long as potentials are finite.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.onnx_files import attribute

ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Relu", "Clip", "Min", "Max", "Where", "Cast", "Not", "And", "Or"),
    *("GreaterOrEqual", "Greater", "LessOrEqual", "Less"),
}
COMPARISONS = {"GreaterOrEqual", "Greater", "LessOrEqual", "Less"}
Image = tuple[int, ...]  # shape of an image: C, H, W


def rewrite(network: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite `network` in place so that it runs faster in OpenVINO, and return it. Unmatched nodes do not change."""
    for change in (unsigned, choose_reset, pool_bytes, split_in_place):
        change(Graph(network))
    del network.graph.value_info[:]  # the recorded shapes are those before the change
    return network


class Graph:
    """The maker and the users of each value of a network, and its constants, at the time of construction."""

    def __init__(self, network: onnx.ModelProto) -> None:
        self.proto = network.graph
        self.constants = {tensor.name: tensor for tensor in self.proto.initializer}
        self.makers = {output: node for node in self.proto.node for output in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in dict.fromkeys(node.input):
                self.users[name].append(node)
        self.outputs = {value.name for value in self.proto.output}
        self._shapes = {value.name: value.type.tensor_type.shape.dim for value in self.proto.value_info}

    def maker(self, value: str, kind: str) -> onnx.NodeProto | None:
        """Return the node that makes a value, if it is of that kind."""
        node = self.makers.get(value)
        return node if node is not None and node.op_type == kind else None

    def constant(self, value: str) -> NDArray[Any] | None:
        return onnx.numpy_helper.to_array(self.constants[value]) if value in self.constants else None

    def image(self, value: str) -> Image:
        """Return C, H and W of a value [N, C, H, W] of known size; () for all others."""
        sizes = tuple(dim.dim_value for dim in self._shapes.get(value, ()))
        return sizes[1:] if len(sizes) == 4 and all(sizes[1:]) else ()

    def add_constant(self, name: str, array: NDArray[Any]) -> str:
        if name not in self.constants:
            self.proto.initializer.append(onnx.numpy_helper.from_array(array, name))
            self.constants[name] = self.proto.initializer[-1]
        return name

    def put(self, rewritten: Callable[[onnx.NodeProto], Sequence[onnx.NodeProto]]) -> None:
        """Replace each node by the given nodes, and drop nodes that nothing uses any more."""
        nodes = [new for node in self.proto.node for new in rewritten(node)]
        used = {name for node in nodes for name in node.input} | self.outputs
        while len(living := [node for node in nodes if used.intersection(node.output)]) < len(nodes):
            nodes = living
            used = {name for node in nodes for name in node.input} | self.outputs
        del self.proto.node[:]
        self.proto.node.extend(nodes)


def unsigned(graph: Graph) -> None:
    """Use uint8 in place of int8 activations; weights stay int8.

    Only spikes and their means are quantised, to 0 to 127 steps, which are the same numbers in both types. x86
    multiplies unsigned by signed bytes, and OpenVINO fuses only an unsigned rounding with the neuron before it, which
    saves a fifth of the time.
    """
    for node in graph.proto.node:
        if node.op_type != "QuantizeLinear" or len(node.input) < 3:
            continue
        tensor = graph.constants.get(node.input[2])
        if tensor is not None and tensor.data_type == onnx.TensorProto.INT8:
            zero = onnx.numpy_helper.to_array(tensor).astype(np.uint8)
            tensor.CopyFrom(onnx.numpy_helper.from_array(zero, tensor.name))


def choose_reset(graph: Graph) -> None:
    """Compute u (1 - spike) by one Where, without the spike as a number: 0 if the neuron fired, else u."""

    def rewritten(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        for rest, value in (node.input, reversed(node.input)) if node.op_type == "Mul" else ():
            fired = _complement(graph, rest)
            if fired is not None:
                one = graph.constant(graph.makers[rest].input[0])
                assert one is not None  # `_complement` has checked it
                zero = graph.add_constant(f"zero/{one.dtype}", np.zeros((), one.dtype))
                return [onnx.helper.make_node("Where", [fired, zero, value], node.output, node.name)]
        return [node]

    graph.put(rewritten)


def _complement(graph: Graph, value: str) -> str | None:
    """Return b if the value is 1 - b and b is the result of a comparison as a number."""
    subtraction = graph.maker(value, "Sub")
    one = None if subtraction is None else graph.constant(subtraction.input[0])
    if subtraction is None or one is None or one.size > 1 or one != 1:
        return None
    cast = graph.maker(subtraction.input[1], "Cast")
    return cast.input[0] if cast is not None and _compares(graph, cast.input[0]) else None


def _compares(graph: Graph, value: str) -> bool:
    return value in graph.makers and graph.makers[value].op_type in COMPARISONS


def pool_bytes(graph: Graph) -> None:
    """Quantise spikes before their average is taken, on the grid of the averages: windows then add up bytes.

    A spike is represented by as many steps as a window has places, so that every average is a whole number of steps.
    """
    pools = {}
    for node in graph.proto.node:
        users = graph.users[node.output[0]] if node.op_type == "AveragePool" else []
        if [user.op_type for user in users] == ["QuantizeLinear"] and _adds_up(graph, node, users[0]):
            pools[node.output[0]] = users[0].input[1:]

    def rewritten(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.op_type != "AveragePool" or node.output[0] not in pools:
            return [node]
        spikes, step, counted = node.input[0], pools[node.output[0]], f"{node.output[0]}/counted"
        node.input[0] = f"{counted}/spikes"
        return [
            onnx.helper.make_node("QuantizeLinear", [spikes, *step], [counted], counted),
            onnx.helper.make_node("DequantizeLinear", [counted, *step], [node.input[0]], node.input[0]),
            node,
        ]

    graph.put(rewritten)


def _adds_up(graph: Graph, pool: onnx.NodeProto, quantised: onnx.NodeProto) -> bool:
    """Whether windows of spikes are averaged that have as many places as there are steps from 0 to 1."""
    places = prod(attribute(pool, "kernel_shape", ()))
    step = graph.constant(quantised.input[1])
    whole = not any(attribute(pool, "pads", ())) and not attribute(pool, "ceil_mode", 0)
    plain = whole and attribute(pool, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    # whether the quantisation has exactly one level per place of the window
    fits = step is not None and step.size == 1 and float(step) * places == 1 and places < 128
    return plain and fits and _are_spikes(graph, pool.input[0])


def _are_spikes(graph: Graph, value: str) -> bool:
    joined = graph.maker(value, "Concat")
    parts = [value] if joined is None else joined.input
    casts = [graph.maker(part, "Cast") for part in parts]
    return all(cast is not None and _compares(graph, cast.input[0]) for cast in casts)


def split_in_place(graph: Graph) -> None:
    """Let the neurons of an int8 convolution work on [N, H W C], the order in which it writes.

    OpenVINO then splits the steps without copies, which it does for values of two dimensions only, and no transposition
    is needed.

    Values quantised after the neurons stay quantised: the Q/DQ pair moves before the views, where OpenVINO expects it.
    """
    flat: dict[str, Image] = {}  # values that are split, and those that are joined again
    for node in graph.proto.node:
        if node.op_type == "Split" and attribute(node, "axis", 0) == 0 and _in_int8(graph, node):
            joined = _joined(graph, node)
            flat |= dict.fromkeys([node.input[0], *joined] if joined else [], graph.image(node.input[0]))

    def rewritten(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.op_type == "Split" and node.input[0] in flat:
            source, node.input[0] = node.input[0], f"{node.input[0]}/flat"
            return [*_flattened(graph, source, flat[source]), node]
        if node.op_type == "Concat" and node.output[0] in flat:
            target, node.output[0] = node.output[0], f"{node.output[0]}/flat"
            return [node, *_viewed(graph, target, flat[target])]
        if node.op_type == "QuantizeLinear" and node.input[0] in flat and _pairs(graph, node):
            node.input[0] = f"{node.input[0]}/flat"
        elif node.op_type == "DequantizeLinear" and (rounding := graph.maker(node.input[0], "QuantizeLinear")):
            joined = rounding.input[0].removesuffix("/flat")
            if joined in flat and _pairs(graph, rounding):
                target, node.output[0] = node.output[0], f"{node.output[0]}/flat"
                return [node, *_viewed(graph, target, flat[joined])]
        return [node]

    graph.put(rewritten)


def _flattened(graph: Graph, source: str, image: Image) -> list[onnx.NodeProto]:
    """Make nodes that flatten source [N, C, H, W] to source/flat [N, H W C]."""
    size = graph.add_constant(f"size/{prod(image)}", np.array([-1, prod(image)], np.int64))
    return [
        onnx.helper.make_node("Transpose", [source], [f"{source}/nhwc"], f"{source}/nhwc", perm=[0, 2, 3, 1]),
        onnx.helper.make_node("Reshape", [f"{source}/nhwc", size], [f"{source}/flat"], f"{source}/flat"),
    ]


def _viewed(graph: Graph, target: str, image: Image) -> list[onnx.NodeProto]:
    """Make nodes that view target/flat [N, H W C] as target [N, C, H, W]."""
    channels, height, width = image
    name = f"size/{height}/{width}/{channels}"
    size = graph.add_constant(name, np.array([-1, height, width, channels], np.int64))
    return [
        onnx.helper.make_node("Reshape", [f"{target}/flat", size], [f"{target}/nhwc"], f"{target}/nhwc"),
        onnx.helper.make_node("Transpose", [f"{target}/nhwc"], [target], f"{target}/nchw", perm=[0, 3, 1, 2]),
    ]


def _pairs(graph: Graph, rounding: onnx.NodeProto) -> bool:
    """Whether a rounding has one step for all values, and DequantizeLinear alone uses it."""
    users = {user.op_type for user in graph.users[rounding.output[0]]}
    return users == {"DequantizeLinear"} and _scalar(graph, rounding.input[1])


def _in_int8(graph: Graph, split: onnx.NodeProto) -> bool:
    """Whether a Split alone uses the output of a quantised convolution of known size, which writes channels last."""
    product = graph.maker(split.input[0], "Conv")
    quantised = product is not None and graph.maker(product.input[0], "DequantizeLinear") is not None
    return quantised and graph.image(split.input[0]) != () and len(graph.users[split.input[0]]) == 1


def _joined(graph: Graph, split: onnx.NodeProto) -> list[str]:
    """Return the Concats along the batch in which all results of a Split end.

    There are none if a node between the two depends on places or channels.
    """
    inside, joined = set(split.output), list[str]()
    for node in _behind(graph, split):
        if node.op_type == "Concat" and attribute(node, "axis", 0) == 0 and inside.issuperset(node.input):
            joined.append(node.output[0])
        elif node.op_type in ELEMENTWISE and all(value in inside or _scalar(graph, value) for value in node.input):
            inside.update(node.output)
        else:
            return []
    return [] if inside & graph.outputs else joined


def _behind(graph: Graph, split: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Return the nodes that use a Split's outputs, directly or through elementwise nodes, in order of computation."""
    reached = set(split.output)
    for node in graph.proto.node:
        if reached.intersection(node.input):
            yield node
            if node.op_type in ELEMENTWISE:
                reached.update(node.output)


def _scalar(graph: Graph, value: str) -> bool:
    array = graph.constant(value)
    return not value or (array is not None and array.size == 1 and array.ndim < 2)
