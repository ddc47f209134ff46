"""The vector-Jacobian product of each operator that exported networks are made of.

A rule `(tape, node, cotangents)` gives the node's inputs their cotangents, from those of its outputs (None: that output
does not reach the loss).
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import TypeGuard

import numpy as np
import onnx

from mpdsgr_deploy.attack_graph.tape import Piece, Tape, attribute, refuse

Rule = Callable[[Tape, onnx.NodeProto, Sequence[str | None]], None]


def _one(cotangents: Sequence[str | None]) -> str:
    """The cotangent of the only output."""
    (cotangent,) = cotangents
    assert cotangent is not None  # a rule is asked only where there is one
    return cotangent


def _sign(sign: int) -> Rule:
    """a + b or a - b."""

    def rule(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
        for value, own in zip(node.input, (1, sign), strict=True):
            if tape.depends(value):
                tape.give(value, tape.unbroadcast(_one(cotangents), value, node.output[0]), own)

    return rule


def _mul(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    for value, other in (node.input, reversed(node.input)):
        if tape.depends(value):
            product = tape.emit("Mul", _one(cotangents), tape.float32(other))
            tape.give(value, tape.unbroadcast(product, value, node.output[0]))


def _div(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    above, below = node.input
    if tape.depends(below):
        raise refuse(node, "divides by what depends on the images")
    quotient = tape.emit("Div", _one(cotangents), tape.float32(below))
    tape.give(above, tape.unbroadcast(quotient, above, node.output[0]))


def _same(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """A change of number format: the rounding of weights and exact activations is no function of the images."""
    tape.give(node.input[0], _one(cotangents))


def _constant_weights(tape: Tape, node: onnx.NodeProto) -> str:
    """A product's weights in float32: those of the artefact itself, rounded as they are."""
    if any(tape.depends(value) for value in node.input[1:]):
        raise refuse(node, "has weights that depend on the images")
    return tape.float32(node.input[1])


def _conv(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Stride 1: a convolution with the weights transposed and flipped. Else a transposed convolution."""
    weights = _constant_weights(tape, node)
    x, y, kernel = (_plane(tape, node, value) for value in (node.input[0], node.output[0], node.input[1]))
    ones = (1,) * len(x)
    strides, pads = attribute(node, "strides", ones), attribute(node, "pads", (0, 0) * len(x))
    plain = attribute(node, "group", 1) == 1 and attribute(node, "dilations", ones) == ones
    if not plain or attribute(node, "auto_pad", b"NOTSET") != b"NOTSET":
        raise refuse(node, "is no plain convolution: it has groups, dilations or automatic padding")
    before, after = pads[: len(x)], pads[len(x) :]
    if strides == ones:
        flipped = tape.emit("Transpose", weights, perm=[1, 0, *range(2, len(x) + 2)])
        if prod(kernel) > 1:
            ends = tape.integers(*(np.iinfo(np.int64).min,) * len(x))
            axes, back = tape.integers(*range(2, len(x) + 2)), tape.integers(*(-1,) * len(x))
            flipped = tape.emit("Slice", flipped, tape.integers(*(-1,) * len(x)), ends, axes, back)
        around = [k - 1 - p for k, p in zip((*kernel, *kernel), (*before, *after), strict=True)]
        found = tape.emit("Conv", _one(cotangents), flipped, kernel_shape=kernel, pads=around)
    else:
        covered = [s * (n - 1) + k for s, n, k in zip(strides, y, kernel, strict=True)]
        left = [n + a + b - c for n, a, b, c in zip(x, before, after, covered, strict=True)]  # beyond the last window
        found = tape.emit(
            "ConvTranspose",
            _one(cotangents),
            weights,
            kernel_shape=kernel,
            strides=strides,
            pads=pads,
            output_padding=left,
        )
    tape.give(node.input[0], found)


def _plane(tape: Tape, node: onnx.NodeProto, value: str) -> tuple[int, ...]:
    """Height and width of a value [B, C, H, W], or as many sizes as it has there."""
    sizes = tape.shape(value)[2:]
    if not _numbers(sizes):
        raise refuse(node, "works on maps of unknown size")
    return sizes


def _numbers(sizes: Sequence[int | str | None]) -> TypeGuard[tuple[int, ...]]:
    return all(isinstance(size, int) for size in sizes)


def _gemm(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    weights = _constant_weights(tape, node)
    if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
        raise refuse(node, "is no linear layer: transA or alpha")
    turned = attribute(node, "transB", 0)
    tape.give(node.input[0], tape.emit("Gemm", _one(cotangents), weights, transB=int(not turned)))


def _matmul(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """A constant matrix on either side."""
    left, right = node.input
    moving, matrix = (right, left) if tape.depends(right) else (left, right)
    if tape.depends(matrix) or len(tape.shape(matrix)) != 2:
        raise refuse(node, "is no product with a constant matrix")
    turned = tape.emit("Transpose", tape.float32(matrix), perm=[1, 0])
    factors = (turned, _one(cotangents)) if moving is right else (_one(cotangents), turned)
    tape.give(moving, tape.emit("MatMul", *factors))


def _average_pool(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Windows side by side: each passes its share on to all its values."""
    kernel = attribute(node, "kernel_shape", ())
    x, y = _plane(tape, node, node.input[0]), _plane(tape, node, node.output[0])
    if attribute(node, "strides", ()) != kernel or any(attribute(node, "pads", ())) or attribute(node, "ceil_mode", 0):
        raise refuse(node, "does not average windows side by side without padding")
    share = _scaled(tape, _one(cotangents), 1 / prod(kernel))
    scales = tape.constant([1, 1, *kernel])
    options = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    spread = tape.emit("Resize", share, "", scales, **options)
    left = [n - k * m for n, k, m in zip(x, kernel, y, strict=True)]  # rows and columns that no window covers
    if any(left):
        pads = tape.integers(*(0,) * len(left), *left)
        spread = tape.emit("Pad", spread, pads, "", tape.integers(*range(2, len(x) + 2)))
    tape.give(node.input[0], spread)


def _scaled(tape: Tape, cotangent: str, factor: float) -> str:
    """factor * cotangent. Right behind a product its weights are scaled instead: once, not in every run."""
    last = tape.graph.node[-1]
    if last.op_type not in ("Conv", "Gemm") or last.output[0] != cotangent:
        return tape.emit("Mul", cotangent, tape.constant(factor))
    product = tape.graph.node.pop()
    product.input[1] = tape.emit("Mul", product.input[1], tape.constant(factor))
    tape.graph.node.append(product)
    return cotangent


def _reduce(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """A sum or a mean over axes of known sizes."""
    value, cotangent = node.input[0], _one(cotangents)
    shape, axes = tape.shape(value), tape.array(node.input[1]) if len(node.input) > 1 else None
    if axes is None:
        raise refuse(node, "does not name its axes")
    sizes = tuple(shape[i] if i in axes % len(shape) else 1 for i in range(len(shape)))
    if not _numbers(sizes):
        raise refuse(node, "goes over axes of unknown sizes")
    if not attribute(node, "keepdims", 1):
        cotangent = tape.emit("Unsqueeze", cotangent, node.input[1])
    if node.op_type == "ReduceMean":
        cotangent = tape.emit("Mul", cotangent, tape.constant(1 / prod(sizes)))
    tape.give(value, tape.emit("Expand", cotangent, tape.integers(*sizes)))


def _concat(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    axis = attribute(node, "axis", 0)
    sizes = tuple(tape.shape(value)[axis] for value in node.input)
    if len(node.input) == 1:
        parts = [_one(cotangents)]
    elif None not in sizes and len(set(sizes)) == 1:
        parts = tape.emit_many("Split", _one(cotangents), names=len(sizes), axis=axis, num_outputs=len(sizes))
    elif _numbers(sizes):
        parts = tape.emit_many("Split", _one(cotangents), tape.integers(*sizes), names=len(sizes), axis=axis)
    else:
        raise refuse(node, "joins parts of unknown sizes")
    for value, part in zip(node.input, parts, strict=True):
        tape.give(value, part)


def _split(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Back together; a part that does not reach the loss counts 0."""

    def zeros(output: str) -> str:
        return tape.emit("Mul", tape.float32(output), tape.constant(0))

    parts = [c or zeros(output) for c, output in zip(cotangents, node.output, strict=True)]
    tape.give(node.input[0], tape.emit("Concat", *parts, axis=attribute(node, "axis", 0)))


def _slice(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    value, *positions = node.input
    found = [tape.array(name) for name in positions]
    axes = found[2] if len(found) > 2 else None
    if axes is None or axes.size != 1 or (len(found) > 3 and (found[3] is None or found[3].tolist() != [1])):
        raise refuse(node, "takes more than a run along one axis")
    axis = int(axes[0]) % len(tape.shape(value))
    size = tape.shape(value)[axis]
    if found[0] is None or found[1] is None or not isinstance(size, int):
        raise refuse(node, "takes a part that is known only at run time")
    start, stop, _ = slice(int(found[0][0]), int(found[1][0])).indices(size)
    tape.give_piece(value, Piece(axis, start, stop, _one(cotangents)))


def _reshape(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Back to the shape before, in which the batch is the only size that is not known."""
    shape = tape.shape(node.input[0])
    if sum(not isinstance(size, int) for size in shape) > 1:
        raise refuse(node, "has an input with more than one unknown size")
    target = tape.integers(*(size if isinstance(size, int) else -1 for size in shape))
    tape.give(node.input[0], tape.emit("Reshape", _one(cotangents), target))


def _inverse(op_type: str) -> Rule:
    """Squeeze and Unsqueeze undo each other."""

    def rule(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
        if len(node.input) < 2:
            raise refuse(node, "does not name its axes")
        tape.give(node.input[0], tape.emit(op_type, _one(cotangents), node.input[1]))

    return rule


def _transpose(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    order = attribute(node, "perm", tuple(range(len(tape.shape(node.input[0]))))[::-1])
    back = np.argsort(order).tolist()
    tape.give(node.input[0], tape.emit("Transpose", _one(cotangents), perm=back))


def _batch_normalization(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Of inference: a fixed factor for each channel."""
    value, scale, _, _, variance = node.input
    if attribute(node, "training_mode", 0):
        raise refuse(node, "normalises by the batch's own statistics")
    epsilon = tape.constant(attribute(node, "epsilon", 1e-5))
    deviation = tape.emit("Sqrt", tape.emit("Add", tape.float32(variance), epsilon))
    channels = tape.integers(-1, *[1] * (len(tape.shape(value)) - 2))
    factor = tape.emit("Reshape", tape.emit("Div", tape.float32(scale), deviation), channels)
    tape.give(value, tape.emit("Mul", _one(cotangents), factor))


RULES: dict[str, Rule] = {
    "Add": _sign(1),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _same,  # of booleans, see `derive`
    "Concat": _concat,
    "Conv": _conv,
    "DequantizeLinear": _same,
    "Div": _div,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Mul": _mul,
    "QuantizeLinear": _same,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _inverse("Unsqueeze"),
    "Sub": _sign(-1),
    "Transpose": _transpose,
    "Unsqueeze": _inverse("Squeeze"),
}
