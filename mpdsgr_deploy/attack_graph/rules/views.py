"""Derivatives of operators that move, cut, join or reduce values."""

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx

from mpdsgr_deploy.attack_graph.rules.common import Rule, are_numbers, axes_of, multiplied, only, reshaped
from mpdsgr_deploy.attack_graph.tape import Piece, Tape, refuse
from mpdsgr_deploy.onnx_files import attribute


def _reduce(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate a sum or a mean over axes of known sizes."""
    value, cotangent = node.input[0], only(cotangents)
    shape = tape.shape(value)
    named = attribute(node, "axes", ())
    axes = axes_of(tape, node, named, len(shape))
    sizes = tuple(size if i in axes else 1 for i, size in enumerate(shape))
    if not are_numbers(sizes):
        raise refuse(node, "goes over axes of unknown sizes")
    if not attribute(node, "keepdims", 1):
        cotangent = tape.emit("Unsqueeze", cotangent, tape.integers(*sorted(axes)) if named else node.input[1])
    if node.op_type == "ReduceMean":
        cotangent = tape.emit("Mul", cotangent, tape.constant(1 / prod(sizes)))
    tape.give(value, tape.emit("Expand", cotangent, tape.integers(*sizes)))


def _reduce_max(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate the maximum along one axis; the first of equal values gets the cotangent."""
    value, cotangent = node.input[0], only(cotangents)
    shape = tape.shape(value)
    named = attribute(node, "axes", ())
    axes = axes_of(tape, node, named, len(shape))
    size = shape[axes[0]]
    if len(axes) != 1 or not isinstance(size, int):
        raise refuse(node, "takes the largest over more than one axis, or over one of unknown size")
    if not attribute(node, "keepdims", 1):
        cotangent = tape.emit("Unsqueeze", cotangent, tape.integers(*axes))
    x = tape.float32(value) if node.op_type == "ReduceMax" else tape.emit("Neg", tape.float32(value))
    first = tape.emit("ArgMax", x, axis=axes[0], keepdims=1)
    places = np.arange(size).reshape(-1, *[1] * (len(shape) - 1 - axes[0]))
    here = tape.emit("Equal", first, tape.constant(places, np.int64))
    tape.give(value, tape.emit("Where", here, cotangent, tape.constant(0)))


def _concat(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    axis = attribute(node, "axis", 0)
    sizes = tuple(tape.shape(value)[axis] for value in node.input)
    if len(node.input) == 1:
        parts = [only(cotangents)]
    elif are_numbers(sizes):
        parts = tape.split(only(cotangents), sizes, axis)
    elif None not in sizes and len(set(sizes)) == 1 and tape.opset >= 18:
        parts = tape.emit_many("Split", only(cotangents), names=len(sizes), axis=axis, num_outputs=len(sizes))
    else:
        raise refuse(node, "joins parts of unknown sizes")
    for value, part in zip(node.input, parts, strict=True):
        tape.give(value, part)


def _split(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Concatenate the parts' cotangents; a part that does not reach the loss has a cotangent of 0."""

    def zeros(output: str) -> str:
        return tape.emit("Mul", tape.float32(output), tape.constant(0))

    parts = [c or zeros(output) for c, output in zip(cotangents, node.output, strict=True)]
    tape.give(node.input[0], tape.emit("Concat", *parts, axis=attribute(node, "axis", 0)))


def _slice(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Put the cotangent of a slice back into place: as a piece along one axis, otherwise axis by axis."""
    value, *names = node.input
    starts, ends, axes, steps = (tape.array(names[i]) if len(names) > i and names[i] else None for i in range(4))
    shape = tape.shape(value)
    if starts is None or ends is None:
        raise refuse(node, "takes a part that is known only at run time")
    places = range(len(starts)) if axes is None else [int(axis) % len(shape) for axis in axes]
    strides = [1] * len(starts) if steps is None else [int(step) for step in steps]
    cuts = []
    for axis, start, end, step in zip(places, starts, ends, strides, strict=True):
        size = shape[axis]
        if isinstance(size, int):
            cuts.append((axis, size, range(*slice(int(start), _end(int(end), step), step).indices(size))))
        elif (int(start), step) != (0, 1) or int(end) < 2**31 - 1:
            raise refuse(node, "takes a part that is known only at run time")
    cuts = [cut for cut in cuts if cut[2] != range(cut[1])] or cuts[:1]
    if not cuts:
        tape.give(value, only(cotangents))
    elif len(cuts) == 1 and cuts[0][2].step == 1:
        axis, _, run = cuts[0]
        tape.give_piece(value, Piece(axis, run.start, run.stop, only(cotangents)))
    else:
        cotangent = only(cotangents)
        for axis, size, run in cuts:
            cotangent = _put_back(tape, cotangent, axis, size, list(run), len(shape))
        tape.give(value, cotangent)


def _end(end: int, step: int) -> int | None:
    """Return the end of a reversed slice as Python writes it; in ONNX it is a very small number."""
    return None if step < 0 and end < -(2**31) + 2 else end


def _put_back(tape: Tape, cotangent: str, axis: int, size: int, places: list[int], rank: int) -> str:
    """Scatter a cotangent to `places` out of `size` along an axis, as a product with unit vectors."""
    units = np.zeros((len(places), size), np.float32)
    units[np.arange(len(places)), places] = 1
    return multiplied(tape, cotangent, axis, units, rank)


def _gather(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate Gather with constant indices of any number of dimensions along one axis."""
    value, indices = node.input[0], tape.array(node.input[1])
    shape = tape.shape(value)
    axis = attribute(node, "axis", 0) % len(shape)
    size = shape[axis]
    if indices is None or not isinstance(size, int):
        if axis or tape.depends(node.input[1]):
            raise refuse(node, "takes elements that are known only at run time")
        rows = tape.emit("Unsqueeze", node.input[1], tape.integers(-1))
        tape.give(value, _scattered(tape, node, rows, only(cotangents)))
        return
    cotangent, places = only(cotangents), [int(i) % size for i in indices.ravel()]
    if indices.ndim == 0:
        cotangent = tape.emit("Unsqueeze", cotangent, tape.integers(axis))
    elif indices.ndim > 1:  # its dimensions replace the axis; here they are flattened into one
        leading, trailing = shape[:axis], shape[axis + 1 :]
        if sum(not isinstance(size, int) for size in (*leading, *trailing)) > 1:
            raise refuse(node, "takes elements of a value of unknown sizes")
        sizes = [*leading, len(places), *trailing]
        flat = tape.integers(*(size if isinstance(size, int) else -1 for size in sizes))
        cotangent = tape.emit("Reshape", cotangent, flat)
    if places == list(range(places[0], places[0] + len(places))):
        tape.give_piece(value, Piece(axis, places[0], places[0] + len(places), cotangent))
    else:
        tape.give(value, _put_back(tape, cotangent, axis, size, places, len(shape)))


def _gather_nd(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate torch's indexing by several arrays, which adaptive pooling uses for sizes that do not divide."""
    if attribute(node, "batch_dims", 0) or tape.depends(node.input[1]):
        raise refuse(node, "takes elements that are known only at run time")
    tape.give(node.input[0], _scattered(tape, node, node.input[1], only(cotangents)))


def _scattered(tape: Tape, node: onnx.NodeProto, places: str, cotangent: str) -> str:
    """Append nodes that sum cotangents at the positions they came from.

    places [..., k]: the positions in the first k axes.
    """
    if tape.opset < 16:
        raise refuse(node, "takes elements that are known only at run time; export with opset 18 or later")
    nothing = tape.emit("Expand", tape.constant(0), tape.emit("Shape", node.input[0]))
    return tape.emit("ScatterND", nothing, places, cotangent, reduction="add")


def _pad(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Cut off constant padding; add the cotangents of reflected and repeated borders where their values came from."""
    value, shape = node.input[0], tape.shape(node.input[0])
    pads = tape.array(node.input[1])
    named = tape.array(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    axes = range(len(shape)) if named is None else [int(axis) % len(shape) for axis in named]
    mode = attribute(node, "mode", b"constant")
    if pads is None or mode not in (b"constant", b"reflect", b"edge"):
        raise refuse(node, "pads in a way that is known only at run time, or wraps around")
    cotangent, half = only(cotangents), len(pads) // 2
    for axis, before, after in zip(axes, pads[:half], pads[half:], strict=True):
        size = shape[axis]
        if not before and not after:
            continue
        if not isinstance(size, int):
            raise refuse(node, "pads an axis of unknown size")
        if mode == b"constant":
            bounds = tape.integers(int(before)), tape.integers(int(before) + size), tape.integers(axis)
            cotangent = tape.emit("Slice", cotangent, *bounds)
        else:
            how = "reflect" if mode == b"reflect" else "edge"
            places = np.pad(np.arange(size), (int(before), int(after)), mode=how)  # type: ignore[call-overload]
            cotangent = _put_back(tape, cotangent, axis, size, places.tolist(), len(shape))
    tape.give(value, cotangent)


def _expand(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    tape.give(node.input[0], tape.unbroadcast(only(cotangents), node.input[0], node.output[0]))


def _reshape(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    tape.give(node.input[0], reshaped(tape, only(cotangents), node.input[0]))


def _inverse(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    """Differentiate Squeeze and Unsqueeze by each other."""
    if len(node.input) < 2:
        _reshape(tape, node, cotangents)
    else:
        inverse = "Squeeze" if node.op_type == "Unsqueeze" else "Unsqueeze"
        tape.give(node.input[0], tape.emit(inverse, only(cotangents), node.input[1]))


def _transpose(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
    order = attribute(node, "perm", tuple(range(len(tape.shape(node.input[0]))))[::-1])
    back = np.argsort(order).tolist()
    tape.give(node.input[0], tape.emit("Transpose", only(cotangents), perm=back))


RULES: dict[str, Rule] = {
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "ReduceMax": _reduce_max,
    "ReduceMean": _reduce,
    "ReduceMin": _reduce_max,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _inverse,
    "Transpose": _transpose,
    "Unsqueeze": _inverse,
}
