"""A model's config.pbtxt for Triton, built as a protobuf message so that it has only fields that Triton knows.

The network gets a check of its images. `mpdsgr serve` refuses images with NaN or values outside [0, 1], but Triton
computes them, and pixels from 0 to 255 would get a confident wrong class from a network that was trained on [0, 1].
With the check, invalid images get NaN instead of logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need

CONFIG, LABELS, VERSION, WARMUP = "config.pbtxt", "labels.txt", "1", "warmup"
# Triton's platform -> the file name that it expects
PLATFORMS = {"onnxruntime_onnx": "model.onnx", "tensorrt_plan": "model.plan"}
TYPES: dict[int, str] = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.FLOAT16: "TYPE_FP16"}
PREFIX = "valid_image"  # of the names of everything that the check adds


def tensors(network: onnx.ModelProto) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the fields of a network's inputs and outputs. Raises InputError for any that Triton cannot describe.

    The field `dims` is the shape without the batch.
    """
    weights = {tensor.name for tensor in network.graph.initializer}
    inputs = [_tensor(value) for value in network.graph.input if value.name not in weights]
    return inputs, [_tensor(value) for value in network.graph.output]


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    batch, *sizes = [dim.dim_value for dim in kind.shape.dim] or [0]  # 0: the size is not fixed
    if batch or not all(sizes) or kind.elem_type not in TYPES:
        raise InputError(
            f"{value.name} of the network is {TensorProto.DataType.Name(kind.elem_type)} {[batch, *sizes]}; for Triton "
            "it must be FLOAT or FLOAT16, with a batch of any size (0) first and fixed sizes behind it"
        )
    return {"name": value.name, "data_type": TYPES[kind.elem_type], "dims": sizes}


def config(
    network: onnx.ModelProto,
    *,
    name: str,
    platform: str,
    largest: int,
    preferred: Sequence[int],
    gpus: int,
    engines: Mapping[str, str],
    parameters: Mapping[str, str],
) -> str:
    """Return the text of config.pbtxt for a network. Raises InputError as `tensors` does.

    largest: the largest batch; preferred: batch sizes to fill; gpus: the number of GPUs, or 0 for the CPU; engines:
    file names by compute capability, if there are several; parameters: notes for people, which backends ignore.

    `dynamic_batching` states only which batches to fill, because every queue policy was seen to delay requests by half
    a second. The warm-up uses an image from a file for the first input, and zeros for the others, which are noise.
    """
    pb2 = need("tritonclient.grpc.model_config_pb2", "serve")
    text_format = need("google.protobuf.text_format", "serve")
    inputs, outputs = tensors(network)
    message = pb2.ModelConfig(name=name, platform=platform, max_batch_size=largest)
    for tensor in inputs:
        message.input.add(**tensor)
    for tensor in outputs:
        message.output.add(**tensor, label_filename=LABELS)
    kinds = pb2.ModelInstanceGroup
    group = message.instance_group.add(count=1, kind=kinds.KIND_GPU if gpus else kinds.KIND_CPU)
    group.gpus.extend(range(gpus))
    message.dynamic_batching.SetInParent()
    message.dynamic_batching.preferred_batch_size.extend(preferred)
    message.cc_model_filenames.update(engines)
    for key, value in sorted(parameters.items()):
        message.parameters[key].string_value = value
    for batch in dict.fromkeys((1, *preferred[:1])):
        warmup = message.model_warmup.add(name=f"batch of {batch}", batch_size=batch)
        for number, tensor in enumerate(inputs):
            fields = {key: value for key, value in tensor.items() if key != "name"}
            content = {"zero_data": True} if number else {"input_data_file": tensor["name"]}
            warmup.inputs[tensor["name"]].CopyFrom(pb2.ModelWarmup.Input(**fields, **content))
    return str(text_format.MessageToString(message))


def guarded(network: onnx.ModelProto, images: str) -> onnx.ModelProto:
    """Return a copy whose first output [B, K] is NaN for images that have NaN or a value outside [0, 1].

    images: the name of the input [B, C, H, W]. The outputs of other images do not change.
    """
    checked = onnx.ModelProto()
    checked.CopyFrom(network)
    graph = checked.graph
    output = graph.output[0]
    unchecked = f"{PREFIX}/{output.name}"
    for existing in graph.node:
        for names in (existing.input, existing.output):
            for place, name in enumerate(names):
                if name == output.name:
                    names[place] = unchecked
    image_type = {value.name: value.type.tensor_type.elem_type for value in graph.input}[images]
    image_dtype = helper.tensor_dtype_to_np_dtype(image_type)
    output_dtype = helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
    for name, value in (
        ("zero", np.array(0, image_dtype)),
        ("one", np.array(1, image_dtype)),
        ("half", np.array(0.5, np.float32)),
        ("nan", np.array(np.nan, output_dtype)),
        ("axes", np.array([1], np.int64)),
    ):
        graph.initializer.append(numpy_helper.from_array(value, f"{PREFIX}/{name}"))

    def node(kind: str, inputs: list[str], result: str, **attributes: Any) -> None:
        names = [name if name in (images, unchecked) else f"{PREFIX}/{name}" for name in inputs]
        graph.node.append(helper.make_node(kind, names, [f"{PREFIX}/{result}"], **attributes))

    node("GreaterOrEqual", [images, "zero"], "above")  # both comparisons are false for NaN
    node("LessOrEqual", [images, "one"], "below")
    node("And", ["above", "below"], "inside")
    node("Cast", ["inside"], "as_float", to=TensorProto.FLOAT)
    node("Flatten", ["as_float"], "flat", axis=1)
    node("ReduceMin", ["flat", "axes"], "least", keepdims=1)
    node("Greater", ["least", "half"], "valid")
    names = [f"{PREFIX}/valid", unchecked, f"{PREFIX}/nan"]
    graph.node.append(helper.make_node("Where", names, [output.name]))
    return checked
