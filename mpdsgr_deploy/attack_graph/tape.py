"""Append a backward pass to a forward graph: its nodes, and the sum of each value's cotangents."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpdsgr_deploy.attack_graph.values import ConstantValues, ValueType, value_types
from mpdsgr_deploy.errors import InputError

PREFIX = "backward/"  # prefix of the name of every node that is added


class Piece(NamedTuple):
    """The cotangent of the elements start <= i < stop of one axis."""

    axis: int
    start: int
    stop: int
    cotangent: str


class Tape:
    """A copy of `network`, to which `emit` appends nodes, with the types and constants of its values.

    The cotangent of a value is d loss / d value, float32 in the value's shape. Only values that depend on `source`, the
    name of the images, have one.
    """

    def __init__(self, network: onnx.ModelProto, source: str) -> None:
        self.network = onnx.ModelProto()
        self.network.CopyFrom(network)
        self.graph = self.network.graph
        self.forward = list(network.graph.node)
        self.makers = {name: node for node in self.forward for name in node.output}
        self.source = source
        self.opset = max(
            (entry.version for entry in network.opset_import if entry.domain in ("", "ai.onnx")), default=0
        )
        self._constant_values = ConstantValues(network)
        self._types = value_types(network, self._constant_values)
        self.smooth: set[str] = set()  # values with a cotangent, set by `find_jumps`
        self.unpaid: set[tuple[str, str]] = set()  # (a node's first output, its input): edges without gradient
        self.node: onnx.NodeProto | None = None  # the node that is being differentiated
        self._constants: dict[tuple[Any, ...], str] = {}
        self._floats: dict[str, str] = {}
        self._cotangents: dict[str, tuple[int, str]] = {}  # sign and name
        self._pieces: dict[str, list[Piece]] = {}
        self._taken: set[str] = set()
        self._count = 0

    def emit(self, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        return self.emit_many(op_type, *inputs, names=[name or self._fresh(op_type)], **attributes)[0]

    def emit_many(self, op_type: str, *inputs: str, names: Sequence[str] | int, **attributes: Any) -> list[str]:
        """Append a node and return its outputs, given as names or as their number."""
        outputs = [self._fresh(op_type) for _ in range(names)] if isinstance(names, int) else list(names)
        self.graph.node.append(helper.make_node(op_type, inputs, outputs, name=outputs[0], **attributes))
        return outputs

    def _fresh(self, op_type: str) -> str:
        self._count += 1
        return f"{PREFIX}{op_type}_{self._count}"

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Return the name of a constant; equal constants are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"{PREFIX}constant_{len(self._constants)}"
            self.graph.initializer.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """Return the name of a constant int64 [n], such as axes, shapes or positions."""
        return self.constant(values, np.int64)

    def float32(self, value: str) -> str:
        """Return the name of a forward value in float32, cast if necessary."""
        if self.type(value).dtype == TensorProto.FLOAT:
            return value
        if value not in self._floats:
            self._floats[value] = self.emit("Cast", value, to=TensorProto.FLOAT)
        return self._floats[value]

    def array(self, value: str) -> NDArray[Any] | None:
        """Return the array of a constant of the forward graph; None if the value depends on an input."""
        return self._constant_values.get(value)

    def scalar(self, value: str) -> float | None:
        """Return the number in a constant of one element; None for any other value."""
        array = self.array(value)
        return float(array.item()) if array is not None and array.size == 1 else None

    def depends(self, value: str) -> bool:
        """Whether a value of the forward graph depends on the source, and so has a cotangent."""
        return value in self.smooth

    def type(self, value: str) -> ValueType:
        """Return shape and type of a value of the forward graph. Raises InputError if they cannot be inferred."""
        if value not in self._types:
            raise InputError(
                f"no attack graph: the shape of value {value!r} cannot be inferred; export the network with fixed "
                "shapes"
            )
        return self._types[value]

    def shape(self, value: str) -> tuple[int | str | None, ...]:
        return self.type(value).shape

    def split(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Split a value into parts of the given sizes along an axis."""
        if len(set(sizes)) == 1 and self.opset >= 18:
            return self.emit_many("Split", value, names=len(sizes), axis=axis, num_outputs=len(sizes))
        return self.emit_many("Split", value, self.integers(*sizes), names=len(sizes), axis=axis)

    def pad(self, value: str, before: Sequence[int], after: Sequence[int], axes: Sequence[int], rank: int) -> str:
        """Pad a value with zeros along some of its axes."""
        if self.opset >= 18:
            return self.emit("Pad", value, self.integers(*before, *after), "", self.integers(*axes))
        pads = np.zeros((2, rank), int)
        pads[0, list(axes)], pads[1, list(axes)] = before, after
        return self.emit("Pad", value, self.integers(*pads.ravel().tolist()))

    def give(self, value: str, cotangent: str, sign: int = 1) -> None:
        """Add sign * cotangent to the cotangent of `value`; do nothing if it does not depend on the source."""
        if not self.depends(value) or (self.node is not None and (self.node.output[0], value) in self.unpaid):
            return
        if value in self._taken:
            raise InputError(f"no attack graph: value {value} gets a gradient from a node that comes before its own")
        if value not in self._cotangents:
            self._cotangents[value] = (sign, cotangent)
            return
        old_sign, old = self._cotangents[value]
        if sign == old_sign:
            self._cotangents[value] = (sign, self.emit("Add", old, cotangent))
        else:  # a difference with a positive sign
            above, below = (cotangent, old) if sign > 0 else (old, cotangent)
            self._cotangents[value] = (1, self.emit("Sub", above, below))

    def give_piece(self, value: str, piece: Piece) -> None:
        """Add the cotangent of a part of `value`."""
        if self.depends(value):
            self._pieces.setdefault(value, []).append(piece)

    def take(self, value: str) -> str | None:
        """Return the sum of the cotangents given to a value; None if there were none."""
        for cotangent in self._whole(value, sorted(self._pieces.pop(value, []))):
            self.give(value, cotangent)
        self._taken.add(value)
        if value not in self._cotangents:
            return None
        sign, cotangent = self._cotangents.pop(value)
        return cotangent if sign > 0 else self.emit("Neg", cotangent)

    def _whole(self, value: str, pieces: list[Piece]) -> list[str]:
        """Make cotangents of a whole value from those of its parts: concatenated where they tile it, else padded."""
        if not pieces:
            return []
        axes, bounds = {piece.axis for piece in pieces}, [0, *(piece.stop for piece in pieces)]
        size = self.shape(value)[pieces[0].axis]
        if len(axes) == 1 and bounds[-1] == size and [piece.start for piece in pieces] == bounds[:-1]:
            return [self.emit("Concat", *(piece.cotangent for piece in pieces), axis=pieces[0].axis)]
        padded = []
        for piece in pieces:
            size = self.shape(value)[piece.axis]
            assert isinstance(size, int)  # otherwise there would be no piece
            padding = [piece.start], [size - piece.stop], [piece.axis]
            padded.append(self.pad(piece.cotangent, *padding, len(self.shape(value))))
        return padded

    def unbroadcast(self, cotangent: str, value: str, result: str) -> str:
        """Reduce a cotangent of `result`'s shape to that of `value`, which was broadcast to it."""
        wide, own = self.shape(result), self.shape(value)
        missing = len(wide) - len(own)
        if missing:
            cotangent = self.emit("ReduceSum", cotangent, self.integers(*range(missing)), keepdims=0)
        spread = [i for i, size in enumerate(own) if size == 1 and wide[missing + i] != 1]
        return self.emit("ReduceSum", cotangent, self.integers(*spread), keepdims=1) if spread else cotangent


class UnsupportedNode(InputError):  # noqa: N818 - the name describes the problem
    """A node that cannot be differentiated: its name and its operator."""

    node: str
    operator: str


def refuse(node: onnx.NodeProto, why: str) -> UnsupportedNode:
    """Return the error to raise for a node that cannot be differentiated."""
    error = UnsupportedNode(f"no attack graph: node {node.name or node.output[0]} ({node.op_type}) {why}")
    error.node, error.operator = node.name or node.output[0], node.op_type
    return error
