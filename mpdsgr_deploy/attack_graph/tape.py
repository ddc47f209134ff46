"""Building the backward pass behind a forward graph: new nodes, and the cotangent of each value added up on the way."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpdsgr_deploy.errors import InputError

PREFIX = "backward/"  # of everything that is added
SMALL = 1024  # elements; larger constants are weights, whose values no shape depends on


class Kind(NamedTuple):
    """Shape and element type of a value of the forward graph; a dimension without a number is a str or None."""

    shape: tuple[int | str | None, ...]
    dtype: int


class Piece(NamedTuple):
    """A cotangent of the elements start <= i < stop of one axis."""

    axis: int
    start: int
    stop: int
    cotangent: str


class Tape:
    """A copy of `network`, to which `emit` appends nodes, and what is known about its values.

    Cotangents, d loss / d value, have the value's shape and are float32. Only values that depend on `source` have one.
    """

    def __init__(self, network: onnx.ModelProto, source: str) -> None:
        self.network = onnx.ModelProto()
        self.network.CopyFrom(network)
        self.graph = self.network.graph
        self.forward = list(network.graph.node)
        self.makers = {name: node for node in self.forward for name in node.output}
        self.kinds = _kinds(network)
        self._initializers = {tensor.name: tensor for tensor in network.graph.initializer}
        self._depends = {source}
        for node in self.forward:
            if not self._depends.isdisjoint(node.input):
                self._depends.update(node.output)
        self._constants: dict[tuple[Any, ...], str] = {}
        self._floats: dict[str, str] = {}
        self._cotangents: dict[str, tuple[int, str]] = {}  # sign and name
        self._pieces: dict[str, list[Piece]] = {}
        self._taken: set[str] = set()
        self._count = 0

    def emit(self, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """The output of a new node behind all others."""
        return self.emit_many(op_type, *inputs, names=[name or self._fresh(op_type)], **attributes)[0]

    def emit_many(self, op_type: str, *inputs: str, names: Sequence[str] | int, **attributes: Any) -> list[str]:
        """The outputs of a new node, by their names or how many they are."""
        outputs = [self._fresh(op_type) for _ in range(names)] if isinstance(names, int) else list(names)
        self.graph.node.append(helper.make_node(op_type, inputs, outputs, name=outputs[0], **attributes))
        return outputs

    def _fresh(self, op_type: str) -> str:
        self._count += 1
        return f"{PREFIX}{op_type}_{self._count}"

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A constant of the graph; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"{PREFIX}constant_{len(self._constants)}"
            self.graph.initializer.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """A constant int64 [n]: axes, shapes, positions."""
        return self.constant(values, np.int64)

    def float32(self, value: str) -> str:
        """A value of the forward graph in float32."""
        if self.kinds[value].dtype == TensorProto.FLOAT:
            return value
        if value not in self._floats:
            self._floats[value] = self.emit("Cast", value, to=TensorProto.FLOAT)
        return self._floats[value]

    def array(self, value: str) -> NDArray[Any] | None:
        """The value of a constant of the forward graph; None if it is computed."""
        tensor = self._initializers.get(value)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def depends(self, value: str) -> bool:
        """Whether a value of the forward graph depends on the source, and so has a cotangent."""
        return value in self._depends

    def shape(self, value: str) -> tuple[int | str | None, ...]:
        """The shape of a value of the forward graph."""
        return self.kinds[value].shape

    def give(self, value: str, cotangent: str, sign: int = 1) -> None:
        """Add sign * cotangent to what `value` has; nothing if it does not depend on the source."""
        if not self.depends(value):
            return
        if value in self._taken:
            raise InputError(f"no attack graph: value {value} gets a gradient from a node that comes before its own")
        if value not in self._cotangents:
            self._cotangents[value] = (sign, cotangent)
            return
        old_sign, old = self._cotangents[value]
        if sign == old_sign:
            self._cotangents[value] = (sign, self.emit("Add", old, cotangent))
        else:  # a difference, positive
            above, below = (cotangent, old) if sign > 0 else (old, cotangent)
            self._cotangents[value] = (1, self.emit("Sub", above, below))

    def give_piece(self, value: str, piece: Piece) -> None:
        """Add a cotangent of a part of `value`."""
        if self.depends(value):
            self._pieces.setdefault(value, []).append(piece)

    def take(self, value: str) -> str | None:
        """The sum of what was given to a value; None if nothing was."""
        for cotangent in self._whole(value, sorted(self._pieces.pop(value, []))):
            self.give(value, cotangent)
        self._taken.add(value)
        if value not in self._cotangents:
            return None
        sign, cotangent = self._cotangents.pop(value)
        return cotangent if sign > 0 else self.emit("Neg", cotangent)

    def _whole(self, value: str, pieces: list[Piece]) -> list[str]:
        """Cotangents of all of a value from those of its parts: put together where they tile it, else padded."""
        if not pieces:
            return []
        axes, bounds = {piece.axis for piece in pieces}, [0, *(piece.stop for piece in pieces)]
        size = self.shape(value)[pieces[0].axis]
        if len(axes) == 1 and bounds[-1] == size and [piece.start for piece in pieces] == bounds[:-1]:
            return [self.emit("Concat", *(piece.cotangent for piece in pieces), axis=pieces[0].axis)]
        padded = []
        for piece in pieces:
            size = self.shape(value)[piece.axis]
            assert isinstance(size, int)  # or there would be no piece
            pads = self.integers(piece.start, size - piece.stop)
            padded.append(self.emit("Pad", piece.cotangent, pads, "", self.integers(piece.axis)))
        return padded

    def unbroadcast(self, cotangent: str, value: str, result: str) -> str:
        """The cotangent of `value` from one that has the shape of `result`, to which it was broadcast."""
        wide, own = self.shape(result), self.shape(value)
        missing = len(wide) - len(own)
        if missing:
            cotangent = self.emit("ReduceSum", cotangent, self.integers(*range(missing)), keepdims=0)
        spread = [i for i, size in enumerate(own) if size == 1 and wide[missing + i] != 1]
        return self.emit("ReduceSum", cotangent, self.integers(*spread), keepdims=1) if spread else cotangent


def refuse(node: onnx.NodeProto, why: str) -> InputError:
    """What to raise for a node that cannot be differentiated."""
    return InputError(f"no attack graph: node {node.name or node.output[0]} ({node.op_type}) {why}")


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute of a node; a list as a tuple."""
    for found in node.attribute:
        if found.name == name:
            value = helper.get_attribute_value(found)
            return tuple(value) if isinstance(default, tuple) else value
    return default


def _kinds(network: onnx.ModelProto) -> dict[str, Kind]:
    """Shape and type of every value. Weights are left out of the inference, which would copy them."""
    bare = onnx.ModelProto(ir_version=network.ir_version, opset_import=network.opset_import)
    bare.graph.name = network.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(bare.graph, field).extend(getattr(network.graph, field))
    for tensor in network.graph.initializer:
        if np.prod(tensor.dims) <= SMALL:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph
    kinds = {tensor.name: Kind(tuple(tensor.dims), tensor.data_type) for tensor in network.graph.initializer}
    for entry in (*graph.input, *graph.value_info, *graph.output):
        tensor = entry.type.tensor_type
        if tensor.HasField("shape"):
            dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
            kinds[entry.name] = Kind(tuple(dims), tensor.elem_type)
    return kinds
