"""Is the artefact the network that was exported? Its answers and its weights, held against what the bundle keeps."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.parity import Parity, compare
from mpdsgr_deploy.reference import Reference

SAME_ROWS = 0.9  # share of images whose logits must agree to 1e-5; the others are single spikes, flipped by rounding
SAME_LABELS = 0.99
PRODUCTS = {"Conv", "Gemm"}
# half a unit in the last place of each format, relative to the number (float) or to its channel's scale (int8)
FLOAT_ROUNDING = {"fp16": 2.0**-11, "fp8": 2.0**-4}


def check_answers(reference: Reference | None, precision: str, logits: NDArray[np.float32]) -> Parity | None:
    """The artefact's clean logits [N, K] against the kept ones; None for a precision that every machine rounds anew."""
    kept = reference.logits.get(precision) if reference else None
    if kept is None:
        return None
    common = min(len(kept), len(logits))
    return compare(kept[:common], logits[:common])


def answer_faults(parity: Parity | None) -> list[str]:
    """What is wrong if the answers differ by more than single spikes."""
    if parity is None:
        return []
    same = parity.within_tolerance >= SAME_ROWS * parity.rows
    labels = parity.labels_differ <= max(1, (1 - SAME_LABELS) * parity.rows)
    return [] if same and labels else [f"the artefact does not answer as the exported network did: {parity}"]


def weight_faults(bundle: Bundle, precision: str) -> list[str]:
    """Layers of a precision whose weights are not float32's, rounded to the format the manifest says they have."""
    layers = bundle.manifest.variants[precision].layers
    exact, rounded = weights(onnx.load(bundle.variant("fp32"))), weights(onnx.load(bundle.variant(precision)))
    if exact.keys() != rounded.keys():
        return [f"{precision} has the layers {', '.join(rounded)}, float32 has {', '.join(exact)}"]
    return [
        f"{precision}: the weights of {name} are not float32's rounded to {layers.get(name, 'fp32')}"
        for name, found in rounded.items()
        if not _is_rounded(exact[name], found, layers.get(name, "fp32"))
    ]


def weights(network: ModelProto) -> dict[str, NDArray[np.float32]]:
    """The weights of every layer as it multiplies by them, quantised ones at their value; by the layer's name."""
    constants = {tensor.name: tensor for tensor in network.graph.initializer}
    made = {output: node for node in network.graph.node for output in node.output}

    def value(name: str) -> NDArray[np.float32]:
        node = made.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            return _dequantised(node, [numpy_helper.to_array(constants[i]) for i in node.input])
        return numpy_helper.to_array(constants[name]).astype(np.float32)

    return {node.name: value(node.input[1]) for node in network.graph.node if node.op_type in PRODUCTS}


def _dequantised(node: NodeProto, arrays: list[NDArray[np.generic]]) -> NDArray[np.float32]:
    values, scale = (array.astype(np.float32) for array in arrays[:2])
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if scale.ndim:
        scale = scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return values * scale


def _is_rounded(exact: NDArray[np.float32], found: NDArray[np.float32], form: str) -> bool:
    """Whether found [O, ...] is within half a step of exact, in the steps of `form`."""
    if exact.shape != found.shape:
        return False
    largest = np.abs(exact).reshape(len(exact), -1).max(1).reshape(-1, *[1] * (exact.ndim - 1))
    if form == "int8":
        step = largest / 127 * 0.5
    elif form in FLOAT_ROUNDING:  # and what lies below the smallest normal number, relative to the channel's largest
        step = np.abs(exact) * FLOAT_ROUNDING[form] + largest * 2.0**-14
    else:
        step = np.zeros_like(exact)
    slack = 1e-6 + 1e-3 * step  # scales are rounded too
    return bool((np.abs(exact - found) <= step + slack * (form != "fp32") + 0.0).all())
