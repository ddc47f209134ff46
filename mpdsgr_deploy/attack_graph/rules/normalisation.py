"""Derivatives of normalisations and of softmax."""

from collections.abc import Sequence
from math import prod

import onnx

from mpdsgr_deploy.attack_graph.rules.common import Rule, are_numbers, only
from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.onnx_files import attribute


def _batch_normalization(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Multiply the cotangent by each channel's fixed factor, as batch normalisation does at inference."""
    value, scale, _, _, variance = node.input
    if attribute(node, "training_mode", 0):
        raise refuse(node, "normalises by the batch's own statistics; export the network in eval mode")
    epsilon = tape.constant(attribute(node, "epsilon", 1e-5))
    deviation = tape.emit("Sqrt", tape.emit("Add", tape.float32(variance), epsilon))
    channels = tape.integers(-1, *[1] * (len(tape.shape(value)) - 2))
    factor = tape.emit("Reshape", tape.emit("Div", tape.float32(scale), deviation), channels)
    tape.give(value, tape.emit("Mul", only(cotangents), factor))


def _mean(tape: Tape, value: str, axes: Sequence[int], size: int) -> str:
    """Append nodes for the mean over axes that have `size` elements together."""
    total = tape.emit("ReduceSum", value, tape.integers(*axes), keepdims=1)
    return tape.emit("Mul", total, tape.constant(1 / size))


def _normalised(tape: Tape, x: str, cotangent: str, axes: Sequence[int], size: int, epsilon: float) -> str:
    """Differentiate (x - mean) / sqrt(var + epsilon), where mean and variance are taken over `axes`."""
    centred = tape.emit("Sub", x, _mean(tape, x, axes, size))
    variance = _mean(tape, tape.emit("Mul", centred, centred), axes, size)
    deviation = tape.emit("Sqrt", tape.emit("Add", variance, tape.constant(epsilon)))
    unit = tape.emit("Div", centred, deviation)
    along = tape.emit("Mul", unit, _mean(tape, tape.emit("Mul", cotangent, unit), axes, size))
    projected = tape.emit("Sub", tape.emit("Sub", cotangent, _mean(tape, cotangent, axes, size)), along)
    return tape.emit("Div", projected, deviation)


def _layer_normalization(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    value, scale = node.input[0], node.input[1]
    shape = tape.shape(value)
    first = attribute(node, "axis", -1) % len(shape)
    sizes = shape[first:]
    if not are_numbers(sizes):
        raise refuse(node, "normalises over an axis of unknown size")
    scaled = tape.emit("Mul", only(cotangents), tape.float32(scale))
    epsilon = attribute(node, "epsilon", 1e-5)
    tape.give(value, _normalised(tape, tape.float32(value), scaled, range(first, len(shape)), prod(sizes), epsilon))


def _instance_normalization(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    value, scale = node.input[0], node.input[1]
    shape = tape.shape(value)
    sizes = shape[2:]
    if not are_numbers(sizes):
        raise refuse(node, "normalises maps of unknown size")
    channels = tape.integers(-1, *[1] * (len(shape) - 2))
    factor = tape.emit("Reshape", tape.float32(scale), channels)
    scaled = tape.emit("Mul", only(cotangents), factor)
    epsilon = attribute(node, "epsilon", 1e-5)
    tape.give(value, _normalised(tape, tape.float32(value), scaled, range(2, len(shape)), prod(sizes), epsilon))


def _softmax(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate Softmax, by y (g - sum(g y)), and LogSoftmax, by g - exp(y) sum(g), for the cotangent g."""
    axis = attribute(node, "axis", -1) % len(tape.shape(node.output[0]))
    cotangent, y, axes = only(cotangents), tape.float32(node.output[0]), tape.integers(axis)
    if node.op_type == "LogSoftmax":
        total = tape.emit("ReduceSum", cotangent, axes, keepdims=1)
        tape.give(node.input[0], tape.emit("Sub", cotangent, tape.emit("Mul", tape.emit("Exp", y), total)))
        return
    product = tape.emit("Mul", cotangent, y)
    total = tape.emit("ReduceSum", product, axes, keepdims=1)
    tape.give(node.input[0], tape.emit("Sub", product, tape.emit("Mul", y, total)))


RULES: dict[str, Rule] = {
    "BatchNormalization": _batch_normalization,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax,
    "Softmax": _softmax,
}
