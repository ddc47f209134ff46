"""Derivatives of pooling and of resizing."""

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mpdsgr_deploy.attack_graph.rules.common import Rule, multiplied, only, plane
from mpdsgr_deploy.attack_graph.rules.products import Window, window_of
from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.onnx_files import attribute


def _average_pool(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate AveragePool: each window passes its cotangent, divided by its size, on to all its values."""
    kernel = attribute(node, "kernel_shape", ())
    x, y = plane(tape, node, node.input[0]), plane(tape, node, node.output[0])
    plain = not any(attribute(node, "pads", ())) and attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    if not plain or attribute(node, "strides", ()) != kernel or attribute(node, "ceil_mode", 0):
        tape.give(node.input[0], _overlapping_average(tape, node, only(cotangents)))
        return
    share = _scaled(tape, only(cotangents), 1 / prod(kernel))
    scales = tape.constant([1, 1, *kernel])
    options = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    spread = tape.emit("Resize", share, "", scales, **options)
    uncovered = [n - k * m for n, k, m in zip(x, kernel, y, strict=True)]  # rows and columns that no window covers
    if any(uncovered):
        spread = tape.pad(spread, [0] * len(uncovered), uncovered, range(2, len(x) + 2), len(x) + 2)
    tape.give(node.input[0], spread)


def _overlapping_average(tape: Tape, node: onnx.NodeProto, cotangent: str) -> str:
    """Differentiate average pooling of any stride and padding."""
    x, y, window = _windows(tape, node)
    kernel, strides, dilations, before, after = window
    count_pads = attribute(node, "count_include_pad", 0)
    if count_pads and not attribute(node, "ceil_mode", 0):
        share = tape.emit("Mul", cotangent, tape.constant(1 / prod(kernel)))
    else:
        counts = []
        for axis in range(len(x)):
            low, high = (-before[axis], x[axis] + after[axis]) if count_pads else (0, x[axis])
            starts = [n * strides[axis] - before[axis] for n in range(y[axis])]
            counts.append([sum(low <= s + j * dilations[axis] < high for j in range(kernel[axis])) for s in starts])
        total = np.ones((), np.float32)
        for count in counts:
            total = total[..., None] * np.array(count, np.float32)
        share = tape.emit("Div", cotangent, tape.constant(total[None, None]))
    channels = tape.shape(node.input[0])[1]
    if not isinstance(channels, int):
        raise refuse(node, "pools an unknown number of channels")
    weights = tape.constant(np.ones((channels, 1, *kernel)))
    return _placed(tape, share, weights, channels, x, y, window)


def _windows(tape: Tape, node: onnx.NodeProto) -> tuple[tuple[int, ...], tuple[int, ...], Window]:
    """Return the spatial sizes of a pooling's input and output, and its window."""
    x, y = plane(tape, node, node.input[0]), plane(tape, node, node.output[0])
    return x, y, window_of(node, x, attribute(node, "kernel_shape", ()))


def _placed(
    tape: Tape, value: str, weights: str, channels: int, x: Sequence[int], y: Sequence[int], window: Window
) -> str:
    """Sum the values of all windows at the positions they came from, by a transposed convolution per channel."""
    kernel, strides, dilations, before, _ = window
    covered = window.covered(y)
    # positions beyond the input on either side are cut off; positions that no window reaches are padded with zeros
    after = [max(0, c - b - n) for c, b, n in zip(covered, before, x, strict=True)]
    spread = tape.emit(
        "ConvTranspose",
        value,
        weights,
        kernel_shape=kernel,
        strides=strides,
        dilations=dilations,
        pads=[*before, *after],
        group=channels,
    )
    missing = [n - (c - b - a) for n, c, b, a in zip(x, covered, before, after, strict=True)]
    if any(missing):
        return tape.pad(spread, [0] * len(x), missing, range(2, len(x) + 2), len(x) + 2)
    return spread


def _max_pool(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate MaxPool: the first of a window's largest values gets its whole cotangent, as in torch.

    Spikes have many ties, and sharing the cotangent among them would give another gradient. The rule uses comparisons
    and a transposed convolution, because not every backend returns the indices of maxima.
    """
    x, y, window = _windows(tape, node)
    kernel, strides, dilations, before, _ = window
    channels = tape.shape(node.input[0])[1]
    if not isinstance(channels, int) or attribute(node, "storage_order", 0):
        raise refuse(node, "pools an unknown number of channels, or by columns")
    axes = tape.integers(*range(2, len(x) + 2))
    after = [max(0, c - b - n) for c, b, n in zip(window.covered(y), before, x, strict=True)]
    padded = tape.float32(node.input[0])
    if any(before) or any(after):
        pads = tape.integers(0, 0, *before, 0, 0, *after)
        padded = tape.emit("Pad", padded, pads, tape.constant(-np.finfo(np.float32).max))
    largest, free, parts = tape.float32(node.output[0]), only(cotangents), []
    for offset in np.ndindex(*kernel):
        starts = [o * d for o, d in zip(offset, dilations, strict=True)]
        ends = [a + s * (n - 1) + 1 for a, s, n in zip(starts, strides, y, strict=True)]
        cut = [tape.integers(*numbers) for numbers in (starts, ends)]
        values = tape.emit("Slice", padded, *cut, axes, tape.integers(*strides))
        chosen, zero = tape.emit("Equal", values, largest), tape.constant(0)
        parts.append(tape.emit("Where", chosen, free, zero))
        free = tape.emit("Where", chosen, zero, free)  # so that later equal values get nothing
    stacked = tape.emit("Concat", *(tape.emit("Unsqueeze", part, tape.integers(2)) for part in parts), axis=2)
    flat = tape.emit("Reshape", stacked, tape.integers(-1, channels * len(parts), *y))
    weights = np.zeros((channels * len(parts), 1, *kernel), np.float32)
    for number, offset in enumerate(np.ndindex(*kernel)):
        weights[number :: len(parts), 0][(slice(None), *offset)] = 1
    tape.give(node.input[0], _placed(tape, flat, tape.constant(weights), channels, x, y, window))


def _global_average_pool(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    sizes = plane(tape, node, node.input[0])
    share = tape.emit("Mul", only(cotangents), tape.constant(1 / prod(sizes)))
    tape.give(node.input[0], tape.emit("Expand", share, tape.integers(1, 1, *sizes)))


def _scaled(tape: Tape, cotangent: str, factor: float) -> str:
    """Append nodes for factor * cotangent.

    If the last node is a product with weights, its weights are scaled instead, once and not in every run.
    """
    last = tape.graph.node[-1]
    if last.op_type not in ("Conv", "Gemm") or last.output[0] != cotangent:
        return tape.emit("Mul", cotangent, tape.constant(factor))
    product = tape.graph.node.pop()
    product.input[1] = tape.emit("Mul", product.input[1], tape.constant(factor))
    tape.graph.node.append(product)
    return cotangent


def _resize(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate nearest and linear resizing: multiply by each changed axis's transposed interpolation matrix."""
    x, y = tape.shape(node.input[0]), tape.shape(node.output[0])
    mode = attribute(node, "mode", b"nearest")
    if mode not in (b"nearest", b"linear") or attribute(node, "axes", ()) or x[:2] != y[:2]:
        raise refuse(node, "does not resize height and width by nearest or linear interpolation")
    sizes = zip(plane(tape, node, node.input[0]), plane(tape, node, node.output[0]), strict=True)
    cotangent, rank = only(cotangents), len(x)
    for axis, (old, new) in enumerate(sizes, 2):
        if old == new:
            continue
        matrix = _interpolation(tape, node, axis, old, new)  # [new, old]
        cotangent = multiplied(tape, cotangent, axis, matrix, rank)
    tape.give(node.input[0], cotangent)


def _interpolation(tape: Tape, node: onnx.NodeProto, axis: int, old: int, new: int) -> np.ndarray:
    """Return the matrix [new, old] of a Resize along one axis, computed by resizing unit vectors."""
    one = onnx.NodeProto()
    one.CopyFrom(node)
    scales = tape.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    by_scale = scales is not None and scales.size > 0
    del one.input[:], one.output[:]
    one.input.extend(["x", "", "scales"] if by_scale else ["x", "", "", "sizes"])
    one.output.append("y")
    graph = helper.make_graph([one], "resize", [onnx.ValueInfoProto(name="x")], [onnx.ValueInfoProto(name="y")])
    if scales is not None and by_scale:
        graph.initializer.append(numpy_helper.from_array(np.array([1, 1, scales[axis]], np.float32), "scales"))
    else:
        graph.initializer.append(numpy_helper.from_array(np.array([old, 1, new]), "sizes"))
    model = helper.make_model(graph, opset_imports=tape.network.opset_import, ir_version=10)
    units = np.eye(old, dtype=np.float32)[:, None]  # [old, 1, old]
    (answer,) = ReferenceEvaluator(model).run(None, {"x": units})
    return np.asarray(answer)[:, 0].T


RULES: dict[str, Rule] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "MaxPool": _max_pool,
    "Resize": _resize,
}
