"""Exact rewrites of a network for OpenVINO, applied each time a file is loaded; the bundle's file is not changed.

They reduce the work outside the products: neurons take fewer operations, spikes stay bytes when they are pooled, and
time steps are split without copies. Logits are the same to the bit as long as potentials are finite.
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
Image = tuple[int, ...]  # the shape (C, H, W) of an image; () if it is unknown


def rewrite(network: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite `network` in place so that it runs faster in OpenVINO, and return it. Unmatched nodes do not change."""
    for change in (unsigned, choose_reset, pool_bytes, split_in_place):
        change(Graph(network))
    del network.graph.value_info[:]  # the recorded shapes are those before the change
    return network


class Graph:
    """The node that computes each value of a network, the nodes that use it, and constants, as of construction."""

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
        """Return the node that computes a value, if its operator is `kind`; otherwise None."""
        node = self.makers.get(value)
        return node if node is not None and node.op_type == kind else None

    def constant(self, value: str) -> NDArray[Any] | None:
        """Return the array of a constant; None for a value that is computed."""
        return onnx.numpy_helper.to_array(self.constants[value]) if value in self.constants else None

    def image(self, value: str) -> Image:
        """Return C, H and W of a value [N, C, H, W] of known size; () for all others."""
        sizes = tuple(dim.dim_value for dim in self._shapes.get(value, ()))
        return sizes[1:] if len(sizes) == 4 and all(sizes[1:]) else ()

    def add_constant(self, name: str, array: NDArray[Any]) -> str:
        """Add a constant, unless there is one of this name already, and return the name."""
        if name not in self.constants:
            self.proto.initializer.append(onnx.numpy_helper.from_array(array, name))
            self.constants[name] = self.proto.initializer[-1]
        return name

    def replace_nodes(self, rewritten: Callable[[onnx.NodeProto], Sequence[onnx.NodeProto]]) -> None:
        """Replace each node by those that `rewritten` returns for it, and remove nodes that nothing uses any more."""
        nodes = [new for node in self.proto.node for new in rewritten(node)]
        used = {name for node in nodes for name in node.input} | self.outputs
        while len(living := [node for node in nodes if used.intersection(node.output)]) < len(nodes):
            nodes = living
            used = {name for node in nodes for name in node.input} | self.outputs
        del self.proto.node[:]
        self.proto.node.extend(nodes)


def unsigned(graph: Graph) -> None:
    """Use uint8 instead of int8 for activations; weights stay int8.

    Only spikes and their means are quantised, to levels 0 to 127, which are the same numbers in both types. x86
    multiplies unsigned by signed bytes, and OpenVINO fuses only an unsigned QuantizeLinear with the neuron before it,
    which saves a fifth of the time.
    """
    for node in graph.proto.node:
        if node.op_type != "QuantizeLinear" or len(node.input) < 3:
            continue
        tensor = graph.constants.get(node.input[2])
        if tensor is not None and tensor.data_type == onnx.TensorProto.INT8:
            zero = onnx.numpy_helper.to_array(tensor).astype(np.uint8)
            tensor.CopyFrom(onnx.numpy_helper.from_array(zero, tensor.name))


def choose_reset(graph: Graph) -> None:
    """Compute u (1 - spike) by one Where on the comparison itself: 0 if the neuron fired, else u."""

    def rewritten(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        for complement, value in (node.input, reversed(node.input)) if node.op_type == "Mul" else ():
            fired = _complement(graph, complement)
            if fired is not None:
                one = graph.constant(graph.makers[complement].input[0])
                assert one is not None  # `_complement` has checked it
                zero = graph.add_constant(f"zero/{one.dtype}", np.zeros((), one.dtype))
                return [onnx.helper.make_node("Where", [fired, zero, value], node.output, node.name)]
        return [node]

    graph.replace_nodes(rewritten)


def _complement(graph: Graph, value: str) -> str | None:
    """Return the boolean b if the value is 1 - b, with the result b of a comparison cast to a number; else None."""
    subtraction = graph.maker(value, "Sub")
    one = None if subtraction is None else graph.constant(subtraction.input[0])
    if subtraction is None or one is None or one.size > 1 or one != 1:
        return None
    cast = graph.maker(subtraction.input[1], "Cast")
    return cast.input[0] if cast is not None and _compares(graph, cast.input[0]) else None


def _compares(graph: Graph, value: str) -> bool:
    return value in graph.makers and graph.makers[value].op_type in COMPARISONS


def pool_bytes(graph: Graph) -> None:
    """Quantise spikes before an average pooling instead of after it, so that the pooling adds bytes.

    A spike is represented by as many levels as a window has pixels, so that every average is a whole number of levels.
    """
    pools = {}
    for node in graph.proto.node:
        users = graph.users[node.output[0]] if node.op_type == "AveragePool" else []
        if [user.op_type for user in users] == ["QuantizeLinear"] and _averages_exactly(graph, node, users[0]):
            pools[node.output[0]] = users[0].input[1:]  # its scale and zero point

    def rewritten(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.op_type != "AveragePool" or node.output[0] not in pools:
            return [node]
        spikes, scale, counted = node.input[0], pools[node.output[0]], f"{node.output[0]}/counted"
        node.input[0] = f"{counted}/spikes"
        return [
            onnx.helper.make_node("QuantizeLinear", [spikes, *scale], [counted], counted),
            onnx.helper.make_node("DequantizeLinear", [counted, *scale], [node.input[0]], node.input[0]),
            node,
        ]

    graph.replace_nodes(rewritten)


def _averages_exactly(graph: Graph, pool: onnx.NodeProto, quantised: onnx.NodeProto) -> bool:
    """Whether a pooling without padding averages spikes, and the quantisation has one level per pixel of its window."""
    pixels = prod(attribute(pool, "kernel_shape", ()))
    scale = graph.constant(quantised.input[1])
    whole = not any(attribute(pool, "pads", ())) and not attribute(pool, "ceil_mode", 0)
    unpadded = whole and attribute(pool, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    fits = scale is not None and scale.size == 1 and float(scale) * pixels == 1 and pixels < 128
    return unpadded and fits and _are_spikes(graph, pool.input[0])


def _are_spikes(graph: Graph, value: str) -> bool:
    joined = graph.maker(value, "Concat")
    parts = [value] if joined is None else joined.input
    casts = [graph.maker(part, "Cast") for part in parts]
    return all(cast is not None and _compares(graph, cast.input[0]) for cast in casts)


def split_in_place(graph: Graph) -> None:
    """Let the neurons of an int8 convolution work on [N, H W C], the order in which it writes.

    OpenVINO splits steps without copies only for values of two dimensions, and in this order it need not transpose.
    Values quantised after the neurons stay quantised: the Q/DQ pair moves before the views, where OpenVINO expects it.
    """
    flat: dict[str, Image] = {}  # values that are split, and those that are joined again
    for node in graph.proto.node:
        if node.op_type == "Split" and attribute(node, "axis", 0) == 0 and _splits_int8(graph, node):
            joined = _concats(graph, node)
            flat |= dict.fromkeys([node.input[0], *joined] if joined else [], graph.image(node.input[0]))

    def rewritten(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.op_type == "Split" and node.input[0] in flat:
            source, node.input[0] = node.input[0], f"{node.input[0]}/flat"
            return [*_flattened(graph, source, flat[source]), node]
        if node.op_type == "Concat" and node.output[0] in flat:
            target, node.output[0] = node.output[0], f"{node.output[0]}/flat"
            return [node, *_viewed(graph, target, flat[target])]
        if node.op_type == "QuantizeLinear" and node.input[0] in flat and _is_scalar_pair(graph, node):
            node.input[0] = f"{node.input[0]}/flat"
        elif node.op_type == "DequantizeLinear" and (rounding := graph.maker(node.input[0], "QuantizeLinear")):
            joined = rounding.input[0].removesuffix("/flat")
            if joined in flat and _is_scalar_pair(graph, rounding):
                target, node.output[0] = node.output[0], f"{node.output[0]}/flat"
                return [node, *_viewed(graph, target, flat[joined])]
        return [node]

    graph.replace_nodes(rewritten)


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


def _is_scalar_pair(graph: Graph, rounding: onnx.NodeProto) -> bool:
    """Whether a QuantizeLinear has one scale for all values, and only DequantizeLinear uses its output."""
    users = {user.op_type for user in graph.users[rounding.output[0]]}
    return users == {"DequantizeLinear"} and _scalar(graph, rounding.input[1])


def _splits_int8(graph: Graph, split: onnx.NodeProto) -> bool:
    """Whether a Split is the only user of a quantised convolution of known size, which writes channels last."""
    product = graph.maker(split.input[0], "Conv")
    quantised = product is not None and graph.maker(product.input[0], "DequantizeLinear") is not None
    return quantised and graph.image(split.input[0]) != () and len(graph.users[split.input[0]]) == 1


def _concats(graph: Graph, split: onnx.NodeProto) -> list[str]:
    """Return the outputs of the Concats along the batch in which all results of a Split end.

    There are none if a node between the two depends on a value's position or channel.
    """
    inside, joined = set(split.output), list[str]()
    for node in _following(graph, split):
        if node.op_type == "Concat" and attribute(node, "axis", 0) == 0 and inside.issuperset(node.input):
            joined.append(node.output[0])
        elif node.op_type in ELEMENTWISE and all(value in inside or _scalar(graph, value) for value in node.input):
            inside.update(node.output)
        else:
            return []
    return [] if inside & graph.outputs else joined


def _following(graph: Graph, split: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that use a Split's outputs, directly or through elementwise nodes, in order of computation."""
    reached = set(split.output)
    for node in graph.proto.node:
        if reached.intersection(node.input):
            yield node
            if node.op_type in ELEMENTWISE:
                reached.update(node.output)


def _scalar(graph: Graph, value: str) -> bool:
    """Whether an input of a node is a constant of one number, or an optional input that is absent."""
    array = graph.constant(value)
    return not value or (array is not None and array.size == 1 and array.ndim < 2)
