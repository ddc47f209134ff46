"""Precision variants of an exported graph: float16 products, and int8 or float8 products with exact activations.

A product with weights (a convolution, a linear layer) is quantised only if its input lies on a known grid, so that
every activation is represented exactly and only the weights are rounded. Spikes lie on a grid because they are 0 or 1,
pooled spikes because they are multiples of 1/4; no calibration images are needed. Weights are quantised symmetrically
with one scale per output channel. The bias stays a float, because an int32 bias would be rounded to multiples of the
weights' scale (spikes have the scale 1).
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from mpdsgr_deploy.exporting.graph import constant, data, initializer, insert
from mpdsgr_deploy.onnx_files import PRODUCTS

# Operators whose outputs consist of values of their inputs
SAME_VALUES = {"Concat", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze"}
SAME_VALUES |= {"Transpose", "Unsqueeze"}


class Grid(NamedTuple):
    """The values 0, step, 2 step, ..., levels * step."""

    step: float
    levels: int


class Format(NamedTuple):
    """A number format of Q/DQ pairs: its largest number, and the integer up to which it represents all integers."""

    dtype: ir.DataType
    numpy: np.dtype[Any]
    largest: float
    exact: int


FORMATS = {
    "int8": Format(ir.DataType.INT8, np.dtype(np.int8), 127, 127),
    "fp8": Format(ir.DataType.FLOAT8E4M3FN, np.dtype(ml_dtypes.float8_e4m3fn), 448, 16),
}
FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
PRECISIONS = (*FLOATS, *FORMATS)


def products(model: ir.Model) -> dict[str, ir.Node]:
    """Return the node of each product with weights, by the name of its layer, in the order of computation."""
    return {str(node.name): node for node in model.graph if node.op_type in PRODUCTS}


def plan(model: ir.Model, precision: str) -> dict[str, str]:
    """Return the precision of each product of a variant of precision `precision`, by the name of its layer.

    int8 and fp8 apply to products of spikes, whose grid the format represents exactly. The first product, of an image,
    stays in float32, because every spike that its rounding flips changes all later layers: in int8 there would be 2.5
    times as many flips, in float16 1.15 times (train/results/flips). The last product stays in float32 too, at no cost
    in time: it runs once for all steps, as the first does with direct coding.
    """
    nodes = products(model)
    if precision in FLOATS or not nodes:
        return dict.fromkeys(nodes, precision)
    grid_of, last, exact = grids(model), list(nodes)[-1], FORMATS[precision].exact
    levels = {name: grid_of[data(node)].levels for name, node in nodes.items() if data(node) in grid_of}
    return {name: precision if name != last and levels.get(name, exact + 1) <= exact else "fp32" for name in nodes}


def convert(model: ir.Model, layers: Mapping[str, str], neurons: str = "fp32") -> ir.Model:
    """Return a copy of a float32 graph with its products in the precisions `layers`, and its neurons in `neurons`.

    layers: a precision for every product, by the name of its layer. neurons: "fp32" or "fp16".
    Input and output stay float32, and so does everything before the first product (normalisation, encoding). Raises
    KeyError for a product that `layers` does not name, and for a quantised one whose input has no grid.
    """
    converted = model.clone()
    names = {node: name for name, node in products(converted).items()}
    grid_of, computed, casts = grids(converted), set[ir.Value](), _Casts()
    for node in list(converted.graph):
        precision = layers[names[node]] if node in names else neurons
        after_a_product = node in names or any(value in computed for value in node.inputs)
        dtype = FLOATS.get(precision, FLOATS[neurons]) if after_a_product else FLOATS["fp32"]
        if after_a_product:
            computed.update(node.outputs)
        source = data(node)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in FLOATS.values():
                node.replace_input_with(index, casts.to(dtype, value, node))
        if precision in FORMATS and node in names:
            _quantize(node, FORMATS[precision], grid_of[source], dtype)
        if node.op_type == "Cast" and node.outputs[0].dtype in FLOATS.values():
            node.attributes["to"] = ir.AttrInt64("to", dtype)
        for value in node.outputs:
            if value.dtype in FLOATS.values():
                value.type = ir.TensorType(dtype)  # a new type, because a clone shares its types with the original
    _restore_output(converted.graph)
    common.RemoveUnusedNodesPass()(converted)
    return converted


class _Casts:
    """Conversions of values to another float type; each is added to the graph only once."""

    def __init__(self) -> None:
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def to(self, dtype: ir.DataType, value: ir.Value, user: ir.Node) -> ir.Value:
        """Return `value` in `dtype`: cast in front of its first `user`, or converted now if it is a constant."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._cast:
            array = constant(value)
            if array is None:
                (cast,) = insert(user, "Cast", [value], {"to": dtype})
                cast.shape, cast.dtype = value.shape, dtype
            else:
                with np.errstate(over="ignore"):  # overflow becomes inf, which `export` refuses
                    array = array.astype(dtype.numpy())
                cast = initializer(user, f"{value.name}/{dtype.name}", array)
            self._cast[value, dtype] = cast
        return self._cast[value, dtype]


def _quantize(node: ir.Node, form: Format, grid: Grid, dtype: ir.DataType) -> None:
    """Insert Q/DQ pairs before a product's input, with its grid's step as scale, and before its weights."""
    weights = constant(node.inputs[1])
    assert weights is not None  # a product with weights
    zero = initializer(node, f"{node.name}/zero", np.zeros((), form.numpy))
    step = initializer(node, f"{node.name}/step", np.asarray(grid.step, dtype.numpy()))
    (rounded,) = insert(node, "QuantizeLinear", [data(node), step, zero])
    node.replace_input_with(0, insert(node, "DequantizeLinear", [rounded, step, zero])[0])
    values, scales = rounded_weights(weights, form, dtype.numpy())
    quantised = [
        initializer(node, f"{node.name}/weights", values),
        initializer(node, f"{node.name}/scales", scales),
        initializer(node, f"{node.name}/zeros", np.zeros(len(scales), form.numpy)),
    ]
    node.replace_input_with(1, insert(node, "DequantizeLinear", quantised, {"axis": 0})[0])


def rounded_weights(weights: NDArray[Any], form: Format, scale: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return weights [O, ...] divided by scales and rounded to numbers of a format, and the scale [O] of each channel.

    scale: the float type of the scales.
    """
    largest = np.abs(weights).reshape(len(weights), -1).max(1)
    # the lower bound keeps the scale of a channel of zeros above 0
    scales = np.maximum(largest / form.largest, np.finfo(scale).tiny).astype(scale)
    scaled = weights / scales.astype(np.float32).reshape(-1, *[1] * (weights.ndim - 1))
    if form.numpy.kind == "i":
        scaled = np.rint(scaled)
    return scaled.clip(-form.largest, form.largest).astype(form.numpy), scales


def _restore_output(graph: ir.Graph) -> None:
    """Cast the output to float32 under its original name, if it is not float32."""
    (computed,) = graph.outputs
    if computed.dtype == FLOATS["fp32"]:
        return
    name, computed.name = computed.name, f"{computed.name}/{computed.dtype}"
    cast = ir.node("Cast", [computed], {"to": FLOATS["fp32"]})
    graph.append(cast)
    (logits,) = cast.outputs
    logits.name, logits.shape, logits.dtype = name, computed.shape, FLOATS["fp32"]
    graph.outputs[0] = logits


def grids(model: ir.Model) -> dict[ir.Value, Grid]:
    """Return the grid of every value that provably has one."""
    known: dict[ir.Value, Grid] = {}
    for node in model.graph:
        grid = _grid(node, known)
        if grid is not None:
            known.update(dict.fromkeys(node.outputs, grid))
    return known


def _grid(node: ir.Node, known: dict[ir.Value, Grid]) -> Grid | None:
    if node.op_type == "Cast" and data(node).dtype == ir.DataType.BOOL:
        return Grid(1.0, 1)
    # the other inputs are shapes or indices
    values = node.inputs if node.op_type in ("Concat", "Mul") else node.inputs[:1]
    inputs = [known[value] for value in values if value in known]
    if len(inputs) < len(values) or not inputs:
        return None
    if node.op_type in SAME_VALUES and len({grid.step for grid in inputs}) == 1:
        return max(inputs)
    if node.op_type == "Mul":  # gated spikes
        return Grid(inputs[0].step * inputs[1].step, inputs[0].levels * inputs[1].levels)
    window = _pooling_window(node)
    return Grid(inputs[0].step / window, inputs[0].levels * window) if window else None


def _pooling_window(node: ir.Node) -> int:
    """Return how many values an average pooling without padding averages; 0 for any other node.

    Global average pooling also gives 0, because no format would represent its grid.
    """
    if node.op_type != "AveragePool":
        return 0
    ceil = node.attributes.get("ceil_mode")
    padded = any(node.attributes.get_ints("pads", [])) or (ceil is not None and ceil.as_int())
    return 0 if padded else prod(node.attributes.get_ints("kernel_shape"))
