"""Helpers that the rules share."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.attack_graph.tape import Tape, refuse

# Arguments: tape, node, and the cotangents of its outputs (None: the output does not affect the loss)
Rule = Callable[[Tape, onnx.NodeProto, Sequence[str | None]], None]


def only(cotangents: Sequence[str | None]) -> str:
    """Return the cotangent of a node of which a single output is used."""
    used = [cotangent for cotangent in cotangents if cotangent is not None]
    assert len(used) == 1  # a rule is called only if the node has an output with a gradient
    return used[0]


def are_numbers(sizes: Sequence[int | str | None]) -> TypeGuard[tuple[int, ...]]:
    """Whether all sizes are known numbers."""
    return all(isinstance(size, int) for size in sizes)


def plane(tape: Tape, node: onnx.NodeProto, value: str) -> tuple[int, ...]:
    """Return the spatial sizes of a value [B, C, ...], for example height and width. Raises InputError if unknown."""
    sizes = tape.shape(value)[2:]
    if not are_numbers(sizes):
        raise refuse(node, "works on feature maps of unknown size; export with fixed shapes")
    return sizes


def constant_weights(tape: Tape, node: onnx.NodeProto) -> str:
    """Return a product's weights in float32, as the artefact has rounded them."""
    if any(tape.depends(value) for value in node.input[1:]):
        raise refuse(node, "has weights that depend on the images")
    return tape.float32(node.input[1])


def axes_of(tape: Tape, node: onnx.NodeProto, attribute: Any, rank: int) -> list[int]:
    """Return the axes that a node names, as an attribute (older opsets) or as the second input, counted from 0."""
    if attribute:
        return [int(axis) % rank for axis in attribute]
    value = node.input[1] if len(node.input) > 1 else ""
    axes = tape.array(value) if value else None
    if axes is None:
        raise refuse(node, "does not name its axes")
    return [int(axis) % rank for axis in axes.ravel()]


def reshaped(tape: Tape, value: str, like: str) -> str:
    """Reshape a cotangent to the shape of a value of the forward graph."""
    shape = tape.shape(like)
    if sum(not isinstance(size, int) for size in shape) > 1:
        return tape.emit("Reshape", value, tape.emit("Shape", like))
    return tape.emit("Reshape", value, tape.integers(*(size if isinstance(size, int) else -1 for size in shape)))


def multiplied(tape: Tape, cotangent: str, axis: int, matrix: NDArray[Any], rank: int) -> str:
    """Multiply a cotangent with `rank` axes by a matrix [old, new] along one of them."""
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    last = cotangent if axis == rank - 1 else tape.emit("Transpose", cotangent, perm=order)
    product = tape.emit("MatMul", last, tape.constant(matrix))
    return product if axis == rank - 1 else tape.emit("Transpose", product, perm=order)
