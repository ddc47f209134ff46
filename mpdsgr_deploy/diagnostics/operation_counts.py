"""Count the parameters and operations of an ONNX network, from the file's own shapes."""

from math import prod
from typing import NamedTuple

import onnx
from onnx import TensorProto

from mpdsgr_deploy.onnx_files import PRODUCTS

QUANTISING = ("QuantizeLinear", "DequantizeLinear")
NUMBERS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.FLOAT8E4M3FN}


class Macs(NamedTuple):
    """Multiply-accumulates per image in products with weights (convolutions, linear layers).

    naive: if every product were computed at all T steps, as the network is written in torch.
    """

    exported: int
    naive: int


def parameters(network: onnx.ModelProto) -> int:
    """Count the numbers (weights, biases, constants) in the tensors, in any precision.

    Scales and zero points of quantised weights, shapes and single constants are not counted.
    """
    quantising = [node for node in network.graph.node if node.op_type in QUANTISING]
    scales = {name for node in quantising for name in node.input[1:]}
    held = [tensor for tensor in network.graph.initializer if tensor.dims and tensor.name not in scales]
    return sum(prod(tensor.dims) for tensor in held if tensor.data_type in NUMBERS)


def macs(network: onnx.ModelProto, T: int) -> Macs:
    """Count the multiply-accumulates of a network of T steps."""
    shapes = _shapes(network)
    exported = naive = 0
    for node in network.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        weight, output = shapes[node.input[1]], shapes[node.output[0]]
        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        # what one output sums over: [O, I, kh, kw] and Gemm's transposed [O, I] have the outputs first
        summed = prod(weight[1:]) if node.op_type == "Conv" or transposed else weight[0]
        per_step = prod(output[1:]) * summed
        exported += output[0] * per_step  # a batch of one has the steps that are computed along its first axis
        naive += T * per_step
    return Macs(exported, naive)


def _shapes(network: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shape of every value for a batch of one image."""
    one = onnx.ModelProto()
    one.CopyFrom(network)
    for value in (*one.graph.input, *one.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del one.graph.value_info[:]  # they describe a batch of any size
    graph = onnx.shape_inference.infer_shapes(one, strict_mode=True, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return shapes
