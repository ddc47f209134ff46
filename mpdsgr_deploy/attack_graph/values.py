"""What is known about a network's values before it runs: shapes, element types, and constants that nodes compute."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mpdsgr_deploy.errors import InputError, one_line

TRIED = (2, 3)  # batch sizes at which shapes are measured
SMALL = 1024  # elements; larger constants are weights, whose values no shape depends on
SHAPES = {"Shape", "Size"}  # operators whose results do not depend on pixels; without them nothing is measured


class ValueType(NamedTuple):
    """Shape and element type (TensorProto) of a value; a dimension without a known size is a str or None."""

    shape: tuple[int | str | None, ...]
    dtype: int


class ConstantValues:
    """The constant values of a network: initializers, and values that nodes compute from constants alone."""

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
        """Return the array behind a value; None if it depends on an input."""
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

    def add(self, value: str, array: NDArray[Any]) -> None:
        """Register a value that was measured."""
        self._computed.setdefault(value, array)

    def _needed(self, value: str) -> NDArray[Any]:
        array = self.get(value)
        assert array is not None  # the inputs of a constant are constants
        return array


def value_types(network: onnx.ModelProto, constants: ConstantValues) -> dict[str, ValueType]:
    """Infer shape and type of every value; a value of unknown rank is left out.

    Shape inference leaves sizes unknown if the batch size is free and the graph computes shapes (Shape, Gather, Concat,
    Reshape). These sizes are measured: the network runs at two batch sizes, and a size that is the same in both does
    not depend on the batch. Integers that are the same in both, such as bounds of slices, are added to `constants`.
    Raises InputError for a graph whose shapes contradict each other.
    """
    types = _inferred(network)
    computed_names = [name for node in network.graph.node for name in node.output if name]
    unknown = [name for name in computed_names if name not in types or any(map(_is_unknown, types[name].shape))]
    images = network.graph.input[0]
    dims = images.type.tensor_type.shape.dim
    if not unknown or len(network.graph.input) > 1 or not all(size.HasField("dim_value") for size in dims[1:]):
        return types
    if SHAPES.isdisjoint(node.op_type for node in network.graph.node):
        return types
    numbers = [name for name in computed_names if name in types and types[name].dtype == TensorProto.INT64]
    try:
        runs = _measured(network, [*unknown, *numbers], [size.dim_value for size in dims[1:]])
    except Exception:  # the network runs only at its own batch size, which running it later reports
        return types
    for name, (first, second) in runs.items():
        if name not in numbers and first.ndim == second.ndim:
            own = types[name].shape if name in types else (None,) * first.ndim
            sizes = zip(own, first.shape, second.shape, strict=True)
            kind = helper.np_dtype_to_tensor_dtype(first.dtype)
            types[name] = ValueType(tuple(_size(*three, dims[0].dim_param or None) for three in sizes), kind)
        if first.dtype == np.int64 and first.size <= SMALL and np.array_equal(first, second):
            constants.add(name, first)
    return types


def _measured(
    network: onnx.ModelProto, values: Sequence[str], shape: Sequence[int]
) -> dict[str, tuple[NDArray[Any], ...]]:
    """Run the network at each trial batch size and return some of its values by name."""
    from mpdsgr_deploy.runtime.session import CPU, Session  # imported only here, because it loads onnxruntime

    whole = onnx.ModelProto()
    whole.CopyFrom(network)
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    with Session(whole, CPU, source="the network, to measure its values") as session:
        draw, name = np.random.default_rng(0), network.graph.input[0].name
        runs = [session({name: draw.random((size, *shape), np.float32)}, values) for size in TRIED]
    return dict(zip(values, zip(*runs, strict=True), strict=True))


def _is_unknown(size: int | str | None) -> bool:
    """Whether a dimension is one that onnx could not infer; it gives some of them names of its own."""
    return size is None or str(size).startswith("unk__")


def _size(
    inferred: int | str | None, first: int | str | None, second: int | str | None, batch: str | None
) -> int | str | None:
    """Return a dimension, given its size at the two batch sizes that were tried."""
    if not _is_unknown(inferred):
        return inferred
    if (first, second) == TRIED:
        return batch
    return first if isinstance(first, int) and first == second else inferred


def without_weights(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network without the values of its weights, which shape inference would copy."""
    bare = onnx.ModelProto(ir_version=network.ir_version, opset_import=network.opset_import)
    bare.graph.name = network.graph.name
    bare.functions.extend(network.functions)
    for field in ("node", "input", "output", "value_info"):
        getattr(bare.graph, field).extend(getattr(network.graph, field))
    for tensor in network.graph.initializer:
        if np.prod(tensor.dims) <= SMALL:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return bare


def _inferred(network: onnx.ModelProto) -> dict[str, ValueType]:
    bare = without_weights(network)
    try:
        graph = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph
    except Exception as error:  # onnx's InferenceError, or an error from its C++ code
        raise InputError(f"no attack graph: the network's shapes cannot be inferred ({one_line(error)})") from None
    types = {tensor.name: ValueType(tuple(tensor.dims), tensor.data_type) for tensor in bare.graph.initializer}
    for entry in (*graph.input, *graph.value_info, *graph.output):
        tensor = entry.type.tensor_type
        if tensor.HasField("shape"):
            dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
            types[entry.name] = ValueType(tuple(dims), tensor.elem_type)
    return types
