"""Check a network's ONNX file: it has only standard parts, and is the float32 network, rounded as its manifest says.

The name of an operator does not determine what it computes: `Mul` of another domain may be anything, and so may a
function that the file defines. Hashes do not cover numbers in an external file. A type such as bfloat16 rounds values
that the manifest says are exact.

A reduced precision must equal float32 except for its rounding. Its logits cannot show that, since rounding changes them
by an unpredictable amount, so the two files are compared node by node, with all their numbers. Rounding the int8 and
float8 activations must change nothing: without it, the file has to give the same logits.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.onnx_files import PRODUCTS
from mpdsgr_deploy.parity import answer_faults, compare
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.image_noise import NoiseSource

STANDARD = ("", "ai.onnx")
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
WHOLE = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}  # types of shapes, axes and comparisons
# The type in which numbers are stored or to which they are cast, by the precision of a layer
STORED = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "fp8": TensorProto.FLOAT8E4M3FN,
}
# half a unit in the last place of each float format, relative to the number
FLOAT_ROUNDING = {"fp16": 2.0**-11, "fp8": 2.0**-4}

Array = NDArray[Any]


def foreign_parts(network: ModelProto, precisions: set[str] | None) -> list[str]:
    """Return the parts of a file that are not standard, lie outside it, or have other number types than `precisions`.

    precisions: those of its layers; None for a file of another library, whose manifest states no number types.
    """
    faults = [f"it defines the custom operator {function.name}" for function in network.functions]
    expected = STORED if precisions is None else {*precisions, "fp32"}
    allowed: set[int] = {STORED[precision] for precision in expected}
    allowed |= set() if precisions is not None else {TensorProto.UINT8, TensorProto.DOUBLE}
    for graph in _graphs(network.graph):
        for tensor in graph.initializer:
            faults += _tensor_faults(tensor, allowed)
        for node in graph.node:
            faults += _node_faults(node, allowed)
    return list(dict.fromkeys(faults))


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
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


class Constant(NamedTuple):
    """A constant tensor: the values that the network computes with, and the TensorProto type that stores them."""

    value: Array
    stored: int


class ResolvedNode(NamedTuple):
    """A node whose inputs are resolved past changes of number format.

    attributes: those that are set, serialised, in the order of their names. inputs: each is a constant, the output of
    an earlier node as (number of the node, counted from 1, and of its output), or the name of an input of the network.
    """

    name: str
    operator: tuple[str, str]  # domain and name
    attributes: tuple[bytes, ...]
    inputs: tuple[Constant | tuple[int, int] | str, ...]


def rounding_faults(bundle: Bundle, precision: str, x: NDArray[np.float32]) -> list[str]:
    """Return how a precision's file differs from the float32 network by more than its rounding.

    x: images [n, C, H, W] on which the rounding of activations is checked. The result is empty for float32, and for a
    network that this package did not train: its reduced precisions may come from a quantiser that makes other choices
    (fused operators, rounded activations), so they are compared with float32 by their verdicts alone.
    """
    if precision == "fp32" or bundle.manifest.origin != "trained":
        return []
    network = onnx.load(bundle.variant(precision))
    layers = bundle.manifest.variants[precision].layers
    faults = [f"{precision}: {fault}" for fault in file_faults(onnx.load(bundle.variant("fp32")), network, layers)]
    return [*faults, *_activation_faults(bundle, precision, network, x)]


def file_faults(exact: ModelProto, rounded: ModelProto, layers: dict[str, str]) -> Iterator[str]:
    """Yield differences between a float32 network and its rounded form, other than the rounding of `layers`.

    layers: the precision in which each layer multiplies, by layer.
    """
    ours, theirs = resolve_nodes(exact), resolve_nodes(rounded)
    if [step.operator for step in ours] != [step.operator for step in theirs]:
        yield f"it does not have the {len(ours)} operators of the float32 network"
        return
    for one, other in zip(ours, theirs, strict=True):
        name, form = one.name, layers.get(one.name, "fp32") if one.operator[1] in PRODUCTS else "fp32"
        if (one.attributes, len(one.inputs)) != (other.attributes, len(other.inputs)):
            yield f"{name} is not the {one.operator[1]} of the float32 network"
            continue
        for place, (a, b) in enumerate(zip(one.inputs, other.inputs, strict=True)):
            if not isinstance(a, Constant) or not isinstance(b, Constant):
                if a != b:
                    yield f"{name} has other inputs than in the float32 network"
            elif one.operator[1] in PRODUCTS and place == 1:
                if b.stored != STORED[form]:
                    yield f"the weights of {name} are not stored in {form}"
                if not is_rounded(a.value, b.value, form):
                    yield f"the weights of {name} are not those of the float32 network rounded to {form}"
            elif not is_rounded(a.value, b.value, form if form == "fp16" else "fp32"):  # int8 and fp8 keep their bias
                yield f"a constant of {name} differs from the float32 network"


def resolve_nodes(network: ModelProto) -> list[ResolvedNode]:
    """Return a network's nodes in the order of the file, without those that only change the number format."""
    constants = {tensor.name: tensor for tensor in network.graph.initializer}
    makers = {output: node for node in network.graph.node for output in node.output}
    places: dict[str, tuple[int, int]] = {}
    resolved_nodes: list[ResolvedNode] = []

    def resolved(name: str) -> Constant | tuple[int, int] | str:
        maker = makers.get(name)
        if maker is not None and _converts(maker, makers):
            if maker.input[0] in constants:
                return Constant(_dequantised(maker, constants), constants[maker.input[0]].data_type)
            return resolved(maker.input[0])
        if name in constants:
            return Constant(numpy_helper.to_array(constants[name]), constants[name].data_type)
        return places.get(name, name)

    for node in network.graph.node:
        if _converts(node, makers):
            continue
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        serial = tuple(attribute.SerializeToString(deterministic=True) for attribute in attributes)
        resolved_nodes.append(
            ResolvedNode(node.name, operator(node), serial, tuple(resolved(name) for name in node.input))
        )
        places |= {output: (len(resolved_nodes), k) for k, output in enumerate(node.output)}
    return resolved_nodes


def operator(node: NodeProto) -> tuple[str, str]:
    """Return a node's operator: its domain ("" for ONNX's own) and its name."""
    return ("" if node.domain in STANDARD else node.domain, node.op_type)


def _converts(node: NodeProto, makers: dict[str, NodeProto]) -> bool:
    """Whether a node only changes the number format. The Cast that turns a comparison into a spike does more."""
    if node.domain not in STANDARD:
        return False
    if node.op_type == "Cast":
        maker, to = makers.get(node.input[0]), next((a.i for a in node.attribute if a.name == "to"), 0)
        return to in (STORED["fp32"], STORED["fp16"]) and (maker is None or maker.op_type != "GreaterOrEqual")
    return node.op_type in QUANTIZING


def _dequantised(node: NodeProto, constants: dict[str, TensorProto]) -> Array:
    values, *scales = (numpy_helper.to_array(constants[name]).astype(np.float32) for name in node.input[:2])
    if not scales:  # a Cast has no scales
        return values
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    scale = scales[0]
    return values * (scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)]) if scale.ndim else scale)


def is_rounded(exact: Array, rounded: Array, form: str) -> bool:
    """Whether `rounded` [O, ...] is `exact` to within half a step of the format `form`; fp32 requires equality."""
    if exact.shape != rounded.shape:
        return False
    if form == "fp32":
        return np.array_equal(exact, rounded)
    exact, rounded = exact.astype(np.float32), rounded.astype(np.float32)
    largest = np.abs(exact).reshape(len(exact), -1).max(1).reshape(-1, *[1] * (exact.ndim - 1))
    # half a step; for floats also that of subnormal numbers, relative to the channel's largest number
    half = largest / 254 if form == "int8" else np.abs(exact) * FLOAT_ROUNDING[form] + largest * 2.0**-14
    return bool((np.abs(exact - rounded) <= 1.001 * half + 1e-6).all())  # scales are rounded too


def _activation_faults(bundle: Bundle, precision: str, network: ModelProto, x: NDArray[np.float32]) -> list[str]:
    """Return a fault if the rounding of activations changes the logits, which means that it is not exact."""
    if not any(node.op_type == "QuantizeLinear" for node in network.graph.node):
        return []
    manifest = bundle.manifest
    noise = NoiseSource(manifest.noise, manifest.recipe.validation.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unrounded.onnx"
        onnx.save(without_rounded_activations(network), path)
        with OnnxRuntime(path, noise=noise) as exact, OnnxRuntime(bundle.variant(precision), noise=noise) as rounded:
            same = not answer_faults(compare(exact(x), rounded(x)))
    return [] if same else [f"{precision}: its scales round activations that are exact in float32"]


def without_rounded_activations(network: ModelProto) -> ModelProto:
    """Return a copy of the network in which products read activations before they are quantised."""
    unrounded = ModelProto.FromString(network.SerializeToString())
    makers = {output: node for node in unrounded.graph.node for output in node.output}
    for node in unrounded.graph.node:
        for place, name in enumerate(node.input):
            dequantise = makers.get(name)
            if dequantise is not None and dequantise.op_type == "DequantizeLinear":
                quantise = makers.get(dequantise.input[0])
                if quantise is not None and quantise.op_type == "QuantizeLinear":
                    node.input[place] = quantise.input[0]
    return unrounded
