"""An ONNX classifier from elsewhere: its requirements, and nodes in front of it that let it take images in [0, 1].

A file that takes float32 [batch, C, H, W] in [0, 1] with a dynamic batch is deployed byte for byte. Otherwise its nodes
and weights stay as they are, and new nodes in front compute the preprocessing that the user states: a range of pixels,
a normalisation, the order of the axes. A batch dimension that was fixed at export is made dynamic if nothing else
depends on it.
"""

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpdsgr_deploy.adoption.free_batch import PREFIX, free_batch
from mpdsgr_deploy.attack_graph.values import without_weights
from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.onnx_files import VIEWS, maker_of_output

LARGEST = 2**31 - 1  # bytes, the limit of protobuf
OLDEST = 13  # the oldest opset that is accepted
PROBABILITIES = {"Softmax", "Sigmoid", "Hardmax"}
ELEMENTWISE = (*VIEWS, "Add", "Cast", "Clip", "Div", "Log", "Max", "Mean", "Min", "Mul", "ReduceMean", "Sum")


class Preprocessing(NamedTuple):
    """How an image in [0, 1] becomes the network's input: scaled to [low, high], then (x - mean) / std per channel.

    mean, std: one number per channel, one for all, or none. layout: the order of the input's axes.
    """

    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: Literal["nchw", "nhwc"] = "nchw"

    @property
    def nothing(self) -> bool:
        """Whether the input is the image itself."""
        return self == Preprocessing()

    def applied(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the network's input, float32 [N, C, H, W] or [N, H, W, C], for images x [N, C, H, W] in [0, 1]."""
        x = x * np.float32(self.high - self.low) + np.float32(self.low)
        if self.mean:
            x = x - np.array(self.mean, np.float32).reshape(-1, 1, 1)
        if self.std:
            x = x / np.array(self.std, np.float32).reshape(-1, 1, 1)
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if self.layout == "nhwc" else x


class Classifier(NamedTuple):
    """A network that maps images float32 [batch, C, H, W] in [0, 1] to logits [batch, K].

    shape: (C, H, W); classes: K; unchanged: whether it is the user's file byte for byte; batch: the batch size of that
    file, None if it is dynamic; before: the preprocessing that the file expects.
    """

    network: onnx.ModelProto
    shape: tuple[int, int, int]
    classes: int
    unchanged: bool
    batch: int | None
    before: Preprocessing


def read_classifier(file: Path, preprocessing: Preprocessing | None = None) -> Classifier:
    """Read a classifier from the user's ONNX file, and add the preprocessing that the file expects to its graph.

    Raises InputError with advice for a file that is no such classifier, and for preprocessing that does not fit it.
    """
    before = Preprocessing() if preprocessing is None else preprocessing
    if not before.low < before.high:
        raise InputError(
            f"--range {before.low:g},{before.high:g} is not a range of pixels; write LOW,HIGH with LOW below HIGH"
        )
    network = _load(file)
    _check_operators(file, network)
    images = _only_input(file, network)
    dims = [d.dim_value if d.HasField("dim_value") else None for d in images.type.tensor_type.shape.dim]
    batch, *sizes = dims
    height, width, channels = sizes if before.layout == "nhwc" else (*sizes[1:], sizes[0])
    if channels is None or height is None or width is None:
        raise InputError(
            f"{file}: input {images.name!r} has no fixed channels, height and width; export the network with a fixed "
            "image size"
        )
    if batch is not None:
        free_batch(network, batch)
    classes = _classes(file, network)
    shape = channels, height, width
    if not before.nothing:
        _put_in_front(file, network, before, shape)
    return Classifier(network, shape, classes, before.nothing and batch is None, batch, before)


def _load(file: Path) -> onnx.ModelProto:
    too_large = f"{file} is larger than 2 GB, which one ONNX file cannot hold; adopt a smaller network"
    try:
        if file.stat().st_size > LARGEST:
            raise InputError(too_large)
        network = onnx.load(file, load_external_data=False)
    except InputError:
        raise
    except Exception as error:  # an OSError, or protobuf's DecodeError, which has no type stubs
        raise InputError(f"{file} is not an ONNX file ({type(error).__name__}: {one_line(error)})") from None
    outside = [tensor for tensor in network.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    if sum(prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in outside) > LARGEST:
        raise InputError(too_large)
    if outside:
        raise InputError(
            f'{file} stores its weights in separate files; save everything in one file: python -c "import onnx; '
            f"onnx.save(onnx.load('{file.name}'), 'one-file.onnx')\""
        )
    if not network.graph.node or not network.graph.output:
        raise InputError(f"{file} is not an ONNX network: it has no nodes or no output")
    return network


def _check_operators(file: Path, network: onnx.ModelProto) -> None:
    opset = next((entry.version for entry in network.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST:
        raise InputError(f"{file} has opset {opset}; export again with opset {OLDEST} or later (21 is best)")
    local_domains = {function.domain for function in network.functions}
    for node in network.graph.node:
        if node.domain not in ("", "ai.onnx", *local_domains):
            raise InputError(
                f"{file}: node {node.name or node.output[0]} is a custom operator ({node.domain}.{node.op_type}); "
                "export with standard ONNX operators only"
            )


def _only_input(file: Path, network: onnx.ModelProto) -> onnx.ValueInfoProto:
    stored = {tensor.name for tensor in network.graph.initializer}
    inputs = [entry for entry in network.graph.input if entry.name not in stored]
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs) or "none"
        raise InputError(
            f"{file} has {len(inputs)} inputs ({names}); export a network whose only input is the images and which "
            "starts with its own initial state"
        )
    images, tensor = inputs[0], inputs[0].type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT or len(tensor.shape.dim) != 4:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise InputError(
            f"{file}: input {images.name!r} is {kind} with {len(tensor.shape.dim)} axes and no batch of images; export "
            "a network that takes float32 [batch, channels, height, width] and unrolls its time steps itself"
        )
    return images


def _classes(file: Path, network: onnx.ModelProto) -> int:
    """Return the number of logits. Raises InputError unless they are the only output, float32 [batch, K].

    Probabilities are refused, too.
    """
    if len(network.graph.output) != 1:
        names = ", ".join(entry.name for entry in network.graph.output)
        raise InputError(f"{file} has {len(network.graph.output)} outputs ({names}); export only the logits")
    logits = network.graph.output[0]
    if logits.type.tensor_type.elem_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(logits.type.tensor_type.elem_type).lower()
        raise InputError(f"{file}: output {logits.name!r} is {kind}; export logits as float32 [batch, classes]")
    last = probabilities(network)
    if last is not None:
        raise InputError(cut_off(file, network, last))
    graph = onnx.shape_inference.infer_shapes(without_weights(network)).graph
    dims = graph.output[0].type.tensor_type.shape.dim
    if len(dims) != 2 or not dims[1].HasField("dim_value"):
        raise InputError(
            f"{file}: output {logits.name!r} is not a batch of logits [batch, classes]; export only such logits"
        )
    return int(dims[1].dim_value)


def probabilities(network: onnx.ModelProto, *, through: Collection[str] = VIEWS) -> onnx.NodeProto | None:
    """Return the node that turns logits into probabilities, if only operators of `through` follow it; else None."""
    last = maker_of_output(network, through)
    return last if last is not None and last.op_type in PROBABILITIES else None


def cut_off(file: Path, network: onnx.ModelProto, last: onnx.NodeProto | None) -> str:
    """Return an error message with advice on how to remove the node `last`, which turns logits into probabilities."""
    holds = f"{file}: output {network.graph.output[0].name!r} holds probabilities, not logits; "
    if last is None:
        return f"{holds}export the values before they are normalised"
    name = last.name or last.output[0]
    return f"{holds}remove node {name} ({last.op_type}) and make its input {last.input[0]!r} the output"


def _put_in_front(file: Path, network: onnx.ModelProto, before: Preprocessing, shape: tuple[int, int, int]) -> None:
    """Insert nodes for the preprocessing between a new input [batch, C, H, W] in [0, 1] and the network's own.

    Raises InputError for a mean or std of another number of channels.
    """
    graph, channels = network.graph, shape[0]
    stored = {tensor.name for tensor in graph.initializer}
    own = next(entry for entry in graph.input if entry.name not in stored)
    steps: list[tuple[str, np.ndarray | None]] = []
    if before.high - before.low != 1:
        steps.append(("Mul", np.array(before.high - before.low)))
    if before.low:
        steps.append(("Add", np.array(before.low)))
    for op_type, values in (("Sub", before.mean), ("Div", before.std)):
        if values and len(values) not in (1, channels):
            raise InputError(
                f"{file} takes {channels} channels, but there are {len(values)} numbers; give one per channel, or one "
                "for all"
            )
        if values:
            steps.append((op_type, np.array(values).reshape(-1, 1, 1)))
    if before.layout == "nhwc":
        steps.append(("Transpose", None))
    value, nodes = f"{PREFIX}images", []
    batch = own.type.tensor_type.shape.dim[0].dim_param or "batch"
    images = helper.make_tensor_value_info(value, TensorProto.FLOAT, [batch, *shape])
    for number, (op_type, array) in enumerate(steps):
        last = number == len(steps) - 1
        output, name = own.name if last else f"{PREFIX}{op_type.lower()}", f"{PREFIX}{op_type}"
        if array is None:
            nodes.append(helper.make_node(op_type, [value], [output], name=name, perm=[0, 2, 3, 1]))
        else:
            graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), f"{name}/by"))
            nodes.append(helper.make_node(op_type, [value, f"{name}/by"], [output], name=name))
        value = output
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *others])
    others_in = [entry for entry in graph.input if entry.name != own.name]
    graph.value_info.append(own)
    del graph.input[:]
    graph.input.extend([images, *others_in])
