"""Count the parameters and the multiply-accumulates of an ONNX network by shape inference."""

from math import prod
from typing import NamedTuple

import onnx
from onnx import TensorProto

from mpdsgr_deploy.onnx_files import PRODUCTS, attribute

QUANTISING = ("QuantizeLinear", "DequantizeLinear")
NUMBERS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.FLOAT8E4M3FN}


class Macs(NamedTuple):
    """Multiply-accumulates per image in products with weights (convolutions and linear layers).

    exported: those of the file, in which a product whose input is the same at every step is computed once.
    naive: those of computing every product at all T steps, as the torch network does.
    """

    exported: int
    naive: int


def parameters(network: onnx.ModelProto) -> int:
    """Return how many weights, biases and other constants the network's tensors hold, in any precision.

    Scales and zero points of quantisation, shapes, and scalars are not counted.
    """
    quantising = [node for node in network.graph.node if node.op_type in QUANTISING]
    scales = {name for node in quantising for name in node.input[1:]}
    tensors = [tensor for tensor in network.graph.initializer if tensor.dims and tensor.name not in scales]
    return sum(prod(tensor.dims) for tensor in tensors if tensor.data_type in NUMBERS)


def macs(network: onnx.ModelProto, T: int) -> Macs:
    """Return the multiply-accumulates of a network of T steps. Only `naive` depends on T."""
    shapes = _shapes(network)
    exported = naive = 0
    for node in network.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        weight, output = shapes[node.input[1]], shapes[node.output[0]]
        transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
        # number of products in one output: weights are [O, I, kh, kw], [O, I] in a transposed Gemm, or [I, O]
        summed = prod(weight[1:]) if node.op_type == "Conv" or transposed else weight[0]
        per_step = prod(output[1:]) * summed
        exported += output[0] * per_step  # for one image, the first axis holds the steps that are computed
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
