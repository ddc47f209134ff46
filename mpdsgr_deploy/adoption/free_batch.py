"""Make a batch dimension dynamic that was fixed at export.

Exporters write a fixed batch size into target shapes (Reshape, Expand, ConstantOfShape) and into initial states, which
have an equal row for each image. Nobody has to trust these edits: `adopt` compares the edited network with the user's
file at the file's batch size, and with itself at other sizes.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

# Operators that broadcast a constant of one row to the batch
BROADCASTS = {
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mul"),
    *("Or", "Pow", "Sub", "Sum", "Where", "Xor"),
}
PREFIX = "adopted/"  # prefix of the name of every value that is added


def free_batch(network: onnx.ModelProto, batch: int) -> None:
    """Make the batch dimension of input and output dynamic in place, and rewrite constants made for `batch` images."""
    graph = network.graph
    del graph.value_info[:]
    stored = {tensor.name for tensor in graph.initializer}
    for entry in (*(entry for entry in graph.input if entry.name not in stored), *graph.output):
        if entry.type.tensor_type.shape.dim:
            entry.type.tensor_type.shape.dim[0].dim_param = "batch"
    constants = _constants(graph)
    for node in graph.node:
        if node.op_type == "Reshape" and (target := constants.get(node.input[1])) is not None:
            _free_target(graph, node, target, batch)
        elif node.op_type == "Expand" and (target := constants.get(node.input[1])) is not None:
            if len(target) > 1 and target[0] == batch:  # values computed from images have the batch axis already
                _replace_input(graph, node, 1, np.array([1, *target[1:]], np.int64))
        elif node.op_type == "ConstantOfShape" and (target := constants.get(node.input[0])) is not None:
            if len(target) > 1 and target[0] == batch:
                _replace_input(graph, node, 0, np.array([1, *target[1:]], np.int64))
        elif node.op_type in BROADCASTS and batch > 1:
            _cut_states(graph, node, constants, batch)


def _cut_states(graph: onnx.GraphProto, node: onnx.NodeProto, constants: dict[str, NDArray[Any]], batch: int) -> None:
    """Replace a constant of `batch` equal rows by one of a single row, which broadcasts."""
    for position, name in enumerate(node.input):
        state = constants.get(name)
        if state is not None and state.ndim > 1 and len(state) == batch and (state == state[:1]).all():
            _replace_input(graph, node, position, state[:1])


def _free_target(graph: onnx.GraphProto, node: onnx.NodeProto, target: NDArray[Any], batch: int) -> None:
    """Replace the batch size, alone or times the time steps, in a target shape by -1 or 0, which ONNX infers."""
    sizes = [int(size) for size in target]
    if -1 in sizes:
        if sizes[0] != batch or 0 in sizes:
            return
        sizes[0] = 0  # 0 copies the size of the input
        for attribute in [entry for entry in node.attribute if entry.name == "allowzero"]:
            node.attribute.remove(attribute)
    else:
        alone = [i for i in range(min(2, len(sizes))) if sizes[i] == batch]
        times_steps = [0] if sizes and sizes[0] and sizes[0] % batch == 0 else []
        if not (alone or times_steps):
            return
        sizes[(alone or times_steps)[0]] = -1
    _replace_input(graph, node, 1, np.array(sizes, np.int64))


def _replace_input(graph: onnx.GraphProto, node: onnx.NodeProto, position: int, array: NDArray[Any]) -> None:
    """Replace an input of a node by a new constant, which no other node uses."""
    name = f"{PREFIX}{node.output[0]}/{position}"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    node.input[position] = name


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """Return the constants of the graph (initializers and Constant nodes) by name."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute:
            value = helper.get_attribute_value(node.attribute[0])
            constants[node.output[0]] = (
                numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
            )
    return constants
