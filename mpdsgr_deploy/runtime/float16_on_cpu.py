"""Run float16 networks on a CPU with every rounding that the ONNX file prescribes.

onnxruntime has no float16 arithmetic on a CPU. It computes float16 nodes in float32 and removes the roundings between
them, so that only the weights of a float16 network would be rounded. It keeps roundings that are Cast nodes.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def for_cpu(model: Path | onnx.ModelProto) -> Path | onnx.ModelProto:
    """Return `rounded_as_written` of a network with float16 weights; any other is returned unchanged."""
    network = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    if not any(tensor.data_type == FLOAT16 for tensor in network.graph.initializer):
        return model
    return rounded_as_written(network)


def rounded_as_written(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the network that computes in float32 and rounds every float16 value to float16.

    Every float16 value keeps its name and becomes float32. As on a machine with float16 arithmetic, a product is
    rounded once, after accumulation in float32.
    """
    types = _types(network)
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    del copy.graph.node[:], copy.graph.value_info[:]
    for tensor in copy.graph.initializer:
        if tensor.data_type == FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in network.graph.node:
        exact = copy.graph.node.add()
        exact.CopyFrom(node)
        for attribute in exact.attribute:
            if node.op_type == "Cast" and attribute.i == FLOAT16:
                attribute.i = FLOAT
        for index, name in enumerate(node.output):
            if types.get(name) == FLOAT16:
                exact.output[index] = f"{name}/exact"
                copy.graph.node.extend(
                    [
                        helper.make_node("Cast", [f"{name}/exact"], [f"{name}/half"], to=FLOAT16),
                        helper.make_node("Cast", [f"{name}/half"], [name], to=FLOAT),
                    ]
                )
    return copy


def _types(network: onnx.ModelProto) -> dict[str, int]:
    """Return the ONNX element type of every value that a node computes, by name."""
    graph = onnx.shape_inference.infer_shapes(network, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
