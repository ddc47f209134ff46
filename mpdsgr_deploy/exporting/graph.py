"""Functions on onnx_ir graphs that several passes share."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the array of a constant value; None for a value that is computed at run time, and for None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that computes a value, if its operator is one of `op_types`; otherwise None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def data(node: ir.Node) -> ir.Value:
    """Return a node's first input. Raises ValueError for a node without one."""
    if not node.inputs or node.inputs[0] is None:
        raise ValueError(f"node {node.name!r} has no input")
    return node.inputs[0]


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, Any] | None = None,
    count: int = 1,
) -> Sequence[ir.Value]:
    """Insert a new node in front of another one and return its `count` outputs."""
    node = ir.node(op_type, inputs, attributes or {}, num_outputs=count)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node.outputs


def initializer(user: ir.Node, name: str, array: NDArray[Any]) -> ir.Value:
    """Add a constant to the graph that the node `user` belongs to, and return its value."""
    tensor = ir.tensor(array, name=name)
    value = ir.val(name, tensor.dtype, array.shape, const_value=tensor)
    assert isinstance(user.graph, ir.Graph)
    user.graph.register_initializer(value)
    return value
