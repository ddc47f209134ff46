"""A check inside a network, for servers that check no values: invalid images get NaN instead of an answer.

`mpdsgr serve` refuses images with NaN or values outside [0, 1]; Triton computes whatever it gets, and 0..255 where the
network was trained on [0, 1] comes out as a confident wrong class.
"""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PREFIX = "valid_image"


def guarded(network: onnx.ModelProto, images: str) -> onnx.ModelProto:
    """Return a copy whose first output [B, K] is NaN for images [B, C, H, W] with NaN or a value outside [0, 1].

    images: the name of that input. The other rows are computed by the network's own nodes.
    """
    checked = onnx.ModelProto()
    checked.CopyFrom(network)
    graph = checked.graph
    output = graph.output[0]
    unchecked = f"{PREFIX}/{output.name}"
    for existing in graph.node:
        for names in (existing.input, existing.output):
            for place, name in enumerate(names):
                if name == output.name:
                    names[place] = unchecked
    kind = {value.name: value.type.tensor_type.elem_type for value in graph.input}[images]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    answer = helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
    for name, value in (
        ("zero", np.array(0, dtype)),
        ("one", np.array(1, dtype)),
        ("half", np.array(0.5, np.float32)),
        ("nan", np.array(np.nan, answer)),
        ("axes", np.array([1], np.int64)),
    ):
        graph.initializer.append(numpy_helper.from_array(value, f"{PREFIX}/{name}"))

    def node(kind: str, inputs: list[str], result: str, **attributes: Any) -> None:
        names = [name if name in (images, unchecked) else f"{PREFIX}/{name}" for name in inputs]
        graph.node.append(helper.make_node(kind, names, [f"{PREFIX}/{result}"], **attributes))

    node("GreaterOrEqual", [images, "zero"], "above")  # neither holds of NaN
    node("LessOrEqual", [images, "one"], "below")
    node("And", ["above", "below"], "inside")
    node("Cast", ["inside"], "as_float", to=TensorProto.FLOAT)
    node("Flatten", ["as_float"], "flat", axis=1)
    node("ReduceMin", ["flat", "axes"], "least", keepdims=1)
    node("Greater", ["least", "half"], "valid")
    names = [f"{PREFIX}/valid", unchecked, f"{PREFIX}/nan"]
    graph.node.append(helper.make_node("Where", names, [output.name]))
    return checked
