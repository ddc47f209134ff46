"""Check that an ONNX file uses standard parts only: an operator's name alone does not say what it computes.

`Mul` of another domain may be anything, and so may a function defined in the file; numbers in an external file are not
covered by the hash; a type such as bfloat16 rounds values that the manifest says are exact.
"""

from collections.abc import Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

STANDARD = ("", "ai.onnx")
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
WHOLE = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}  # shapes, axes and comparisons
# What numbers may be stored in or cast to, by the precision of the layers in a file
STORED = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "fp8": TensorProto.FLOAT8E4M3FN,
}


def foreign_parts(network: ModelProto, precisions: set[str] | None) -> list[str]:
    """Return the parts of a file that are not standard, lie outside it, or round differently from `precisions`.

    precisions: those of its layers; None for a file of another library, which promises no number types.
    """
    faults = [f"it defines the custom operator {function.name}" for function in network.functions]
    named = STORED if precisions is None else {*precisions, "fp32"}
    allowed: set[int] = {STORED[precision] for precision in named}
    allowed |= set() if precisions is not None else {TensorProto.UINT8, TensorProto.DOUBLE}
    for graph in _graphs(network.graph):
        for tensor in graph.initializer:
            faults += _tensor_faults(tensor, allowed)
        for node in graph.node:
            faults += _node_faults(node, allowed)
    return list(dict.fromkeys(faults))


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and all graphs in its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.type == AttributeProto.GRAPH else [])):
                yield from _graphs(inner)


def _tensor_faults(tensor: TensorProto, allowed: set[int]) -> Iterator[str]:
    if tensor.data_location == TensorProto.EXTERNAL:
        yield f"{tensor.name} is stored in another file, which no hash covers"
    if tensor.data_type not in allowed | WHOLE:
        yield f"{tensor.name} is stored as {TensorProto.DataType.Name(tensor.data_type).lower()}"


def _node_faults(node: NodeProto, allowed: set[int]) -> Iterator[str]:
    if node.domain not in STANDARD:
        yield f"{node.name or node.op_type} is {node.op_type} of the domain {node.domain!r}"
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield from _tensor_faults(attribute.t, allowed)
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i not in allowed | WHOLE:
            yield f"{node.name or 'a Cast'} rounds to {TensorProto.DataType.Name(attribute.i).lower()}"
