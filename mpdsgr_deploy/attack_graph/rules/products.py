"""Derivatives of convolutions, linear layers and matrix products."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnx

from mpdsgr_deploy.attack_graph.rules.common import Rule, are_numbers, constant_weights, only, plane, reshaped
from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.onnx_files import attribute


class Window(NamedTuple):
    """How a convolution or pooling moves along each axis. before, after: the padding, also if it is automatic."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: list[int]
    after: list[int]

    def covered(self, count: Sequence[int]) -> list[int]:
        """Return how many values `count` windows cover along each axis, padding included."""
        sizes = zip(self.strides, count, self.kernel, self.dilations, strict=True)
        return [s * (n - 1) + (k - 1) * d + 1 for s, n, k, d in sizes]


def window_of(node: onnx.NodeProto, x: Sequence[int], kernel: tuple[int, ...]) -> Window:
    """Return the window of a node whose input has the spatial sizes x."""
    ones, zeros = (1,) * len(x), (0, 0) * len(x)
    strides, dilations = attribute(node, "strides", ones), attribute(node, "dilations", ones)
    automatic = attribute(node, "auto_pad", b"NOTSET")
    if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
        sizes = zip(x, strides, kernel, dilations, strict=True)
        total = [max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n) for n, s, k, d in sizes]
        smaller, larger = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = (smaller, larger) if automatic == b"SAME_UPPER" else (larger, smaller)
        return Window(kernel, strides, dilations, *pads)
    named = attribute(node, "pads", zeros) if automatic == b"NOTSET" else zeros
    return Window(kernel, strides, dilations, list(named[: len(x)]), list(named[len(x) :]))


def _conv(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate a convolution: with stride 1 by one with flipped, transposed weights, else by a transposed one."""
    weights = constant_weights(tape, node)
    x, y, kernel = (plane(tape, node, value) for value in (node.input[0], node.output[0], node.input[1]))
    ones, groups = (1,) * len(x), attribute(node, "group", 1)
    _, strides, dilations, before, after = window = window_of(node, x, kernel)
    if strides == ones and dilations == ones and groups == 1:
        flipped = tape.emit("Transpose", weights, perm=[1, 0, *range(2, len(x) + 2)])
        if prod(kernel) > 1:
            ends = tape.integers(*(np.iinfo(np.int64).min,) * len(x))
            axes, back = tape.integers(*range(2, len(x) + 2)), tape.integers(*(-1,) * len(x))
            flipped = tape.emit("Slice", flipped, tape.integers(*(-1,) * len(x)), ends, axes, back)
        pads = [k - 1 - p for k, p in zip((*kernel, *kernel), (*before, *after), strict=True)]
        if min(pads) >= 0:
            tape.give(node.input[0], tape.emit("Conv", only(cotangents), flipped, kernel_shape=kernel, pads=pads))
            return
    # rows and columns after the last window
    uncovered = [n + a + b - c for n, a, b, c in zip(x, before, after, window.covered(y), strict=True)]
    further: dict[str, Any] = {
        name: value for name, value in (("dilations", dilations), ("group", groups)) if value not in (ones, 1)
    }
    spread = tape.emit(
        "ConvTranspose",
        only(cotangents),
        weights,
        kernel_shape=kernel,
        strides=strides,
        pads=[*before, *after],
        output_padding=uncovered,
        **further,
    )
    tape.give(node.input[0], spread)


def _conv_transpose(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate a transposed convolution: by a convolution with the same weights."""
    weights = constant_weights(tape, node)
    kernel = plane(tape, node, node.input[1])
    ones = (1,) * len(kernel)
    if attribute(node, "auto_pad", b"NOTSET") != b"NOTSET" or attribute(node, "output_shape", ()):
        raise refuse(node, "uses auto_pad; export it with explicit pads")
    gathered = tape.emit(
        "Conv",
        only(cotangents),
        weights,
        kernel_shape=kernel,
        strides=attribute(node, "strides", ones),
        pads=attribute(node, "pads", (0, 0) * len(kernel)),
        dilations=attribute(node, "dilations", ones),
        group=attribute(node, "group", 1),
    )
    tape.give(node.input[0], gathered)


def _gemm(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    if len(node.input) > 2 and tape.depends(node.input[2]):
        beta = tape.emit("Mul", only(cotangents), tape.constant(attribute(node, "beta", 1.0)))
        tape.give(node.input[2], tape.unbroadcast(beta, node.input[2], node.output[0]))
    if not tape.depends(node.input[0]):
        if tape.depends(node.input[1]):
            raise refuse(node, "has weights that depend on the images")
        return
    if tape.depends(node.input[1]):
        raise refuse(node, "has weights that depend on the images")
    weights, turned = tape.float32(node.input[1]), attribute(node, "transB", 0)
    if attribute(node, "transA", 0):
        raise refuse(node, "has transA set, which linear layers do not use")
    alpha = attribute(node, "alpha", 1.0)
    scale = {} if alpha == 1.0 else {"alpha": alpha}
    tape.give(node.input[0], tape.emit("Gemm", only(cotangents), weights, transB=int(not turned), **scale))


def _matmul(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate products of matrices in the last two axes; leading axes are broadcast."""
    left, right = node.input
    cotangent = only(cotangents)
    if tape.depends(left):
        sizes = tape.shape(right)
        if len(sizes) < 2:
            raise refuse(node, "multiplies by a vector; export it with matrices")
        if len(sizes) == 2 and are_numbers(sizes) and not tape.depends(right):
            tape.give(left, _through_weights(tape, cotangent, left, right, sizes[1]))
            return
        tape.give(left, _unstacked(tape, tape.emit("MatMul", cotangent, _turned(tape, right)), left, right))
    if tape.depends(right):
        if len(tape.shape(left)) < 2:
            raise refuse(node, "multiplies a vector; export it with matrices")
        tape.give(right, _unstacked(tape, tape.emit("MatMul", _turned(tape, left), cotangent), right, left))


def _through_weights(tape: Tape, cotangent: str, left: str, weights: str, columns: int) -> str:
    """Append nodes for the cotangent of a linear layer's input.

    Gemm reads the weights as they are stored, whereas runtimes would keep a second copy of them for a Transpose.
    """
    rank = len(tape.shape(left))
    rows = cotangent if rank == 2 else tape.emit("Reshape", cotangent, tape.integers(-1, columns))
    product = tape.emit("Gemm", rows, tape.float32(weights), transB=1)
    return product if rank == 2 else reshaped(tape, product, left)


def _turned(tape: Tape, matrix: str) -> str:
    rank = len(tape.shape(matrix))
    return tape.emit("Transpose", tape.float32(matrix), perm=[*range(rank - 2), rank - 1, rank - 2])


def _unstacked(tape: Tape, cotangent: str, value: str, other: str) -> str:
    """Sum a cotangent over the leading axes along which a product broadcast `value`."""
    own, others = tape.shape(value)[:-2], tape.shape(other)[:-2]
    missing = max(0, len(others) - len(own))
    if missing:
        cotangent = tape.emit("ReduceSum", cotangent, tape.integers(*range(missing)), keepdims=0)
    spread = [i for i, size in enumerate(own) if size == 1 and others[i - len(own) :][:1] not in ((), (1,))]
    return tape.emit("ReduceSum", cotangent, tape.integers(*spread), keepdims=1) if spread else cotangent


RULES: dict[str, Rule] = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}
