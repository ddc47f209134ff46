"""What is known about a network's values before it runs: shapes, element types, and constants that nodes compute."""

from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mpdsgr_deploy.errors import InputError, one_line

SMALL = 1024  # elements; larger constants are weights, whose values no shape depends on


class ValueType(NamedTuple):
    """Shape and element type of a value; a dimension without a number is a str or None."""

    shape: tuple[int | str | None, ...]
    dtype: int


class ConstantValues:
    """The constant values of a network: initializers, and what nodes compute from constants alone."""

    def __init__(self, network: onnx.ModelProto) -> None:
        self._opsets = network.opset_import
        self._initializers = {tensor.name: tensor for tensor in network.graph.initializer}
        self._computed: dict[str, NDArray[Any]] = {}
        self._nodes: dict[str, onnx.NodeProto] = {}
        constant = {"", *self._initializers}
        for node in network.graph.node:
            if constant.issuperset(node.input) and not any(a.HasField("g") for a in node.attribute):
                constant.update(node.output)
                self._nodes |= dict.fromkeys(node.output, node)

    def get(self, value: str) -> NDArray[Any] | None:
        """The array behind a value; None if it depends on an input."""
        if value in self._initializers:
            return numpy_helper.to_array(self._initializers[value])
        if value in self._nodes and value not in self._computed:
            node = self._nodes[value]
            outputs = [name for name in node.output if name]
            graph = helper.make_graph([node], "one node", [], [onnx.ValueInfoProto(name=name) for name in outputs])
            graph.initializer.extend(numpy_helper.from_array(self._needed(name), name) for name in node.input if name)
            model = helper.make_model(graph, opset_imports=self._opsets, ir_version=10)
            answers = ReferenceEvaluator(model).run(None, {})
            self._computed |= {name: np.asarray(array) for name, array in zip(outputs, answers, strict=True)}
        return self._computed.get(value)

    def _needed(self, value: str) -> NDArray[Any]:
        array = self.get(value)
        assert array is not None  # what computes a constant is constant
        return array


def value_types(network: onnx.ModelProto) -> dict[str, ValueType]:
    """Shape and type of every value, as far as they can be inferred; a value of unknown rank is left out.

    Weights are left out of the inference, which would copy them. Raises InputError for a graph that contradicts itself.
    """
    bare = onnx.ModelProto(ir_version=network.ir_version, opset_import=network.opset_import)
    bare.graph.name = network.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(bare.graph, field).extend(getattr(network.graph, field))
    for tensor in network.graph.initializer:
        if np.prod(tensor.dims) <= SMALL:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        graph = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph
    except Exception as error:  # onnx's InferenceError, or of C++
        raise InputError(f"no attack graph: the network's shapes cannot be inferred ({one_line(error)})") from None
    types = {tensor.name: ValueType(tuple(tensor.dims), tensor.data_type) for tensor in network.graph.initializer}
    for entry in (*graph.input, *graph.value_info, *graph.output):
        tensor = entry.type.tensor_type
        if tensor.HasField("shape"):
            dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
            types[entry.name] = ValueType(tuple(dims), tensor.elem_type)
    return types
