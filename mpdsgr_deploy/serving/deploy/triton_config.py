"""Make a model's config.pbtxt for Triton as a protobuf message, so that it has only fields that Triton knows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need

CONFIG, LABELS, VERSION, WARMUP = "config.pbtxt", "labels.txt", "1", "warmup"
PLATFORMS = {"onnxruntime_onnx": "model.onnx", "tensorrt_plan": "model.plan"}  # and the file Triton looks for
TYPES: dict[int, str] = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.FLOAT16: "TYPE_FP16"}


class TritonTensor(NamedTuple):
    """An input or output in Triton's form. dims: without the batch."""

    name: str
    data_type: str
    dims: tuple[int, ...]


class TritonPlan(NamedTuple):
    """How one network runs. preferred: batch sizes to fill; engines: file name by compute capability, if several.

    gpus: how many; 0: on the CPU. parameters: notes for people, which backends ignore.
    """

    name: str
    platform: str
    largest: int
    preferred: Sequence[int]
    gpus: int
    engines: Mapping[str, str]
    parameters: Mapping[str, str]


def library() -> Any:
    """Import Triton's protobuf definition of a configuration. Raises InputError that names a missing extra."""
    return need("tritonclient.grpc.model_config_pb2", "serve")


def tensors(network: onnx.ModelProto) -> tuple[list[TritonTensor], list[TritonTensor]]:
    """Return a network's inputs and outputs. Raises InputError for one that Triton cannot describe."""
    weights = {tensor.name for tensor in network.graph.initializer}
    inputs = [_tensor(value) for value in network.graph.input if value.name not in weights]
    return inputs, [_tensor(value) for value in network.graph.output]


def _tensor(value: onnx.ValueInfoProto) -> TritonTensor:
    kind = value.type.tensor_type
    batch, *sizes = [dim.dim_value for dim in kind.shape.dim] or [0]  # 0: left open
    if batch or not all(sizes) or kind.elem_type not in TYPES:
        raise InputError(
            f"{value.name} of the network is {TensorProto.DataType.Name(kind.elem_type)} {[batch, *sizes]}; for Triton "
            "it must be FLOAT or FLOAT16, with a batch of any size (0) first and fixed sizes behind it"
        )
    return TritonTensor(value.name, TYPES[kind.elem_type], tuple(sizes))


def config(plan: TritonPlan, network: onnx.ModelProto) -> str:
    """Return the text of config.pbtxt. Raises InputError as `tensors` does.

    `dynamic_batching` states only which batches to fill, because any queue policy was seen to hold requests for half a
    second. The warm-up uses an image from a file for the first input, and zeros for the others, which are noise.
    """
    pb2 = library()
    text_format = need("google.protobuf.text_format", "serve")
    inputs, outputs = tensors(network)
    message = pb2.ModelConfig(name=plan.name, platform=plan.platform, max_batch_size=plan.largest)
    for tensor in inputs:
        message.input.add(**_described(pb2, tensor))
    for tensor in outputs:
        message.output.add(**_described(pb2, tensor), label_filename=LABELS)
    kinds = pb2.ModelInstanceGroup
    group = message.instance_group.add(count=1, kind=kinds.KIND_GPU if plan.gpus else kinds.KIND_CPU)
    group.gpus.extend(range(plan.gpus))
    message.dynamic_batching.SetInParent()
    message.dynamic_batching.preferred_batch_size.extend(plan.preferred)
    message.cc_model_filenames.update(plan.engines)
    for key, value in sorted(plan.parameters.items()):
        message.parameters[key].string_value = value
    for batch in dict.fromkeys((1, *plan.preferred[:1])):
        warmup = message.model_warmup.add(name=f"batch of {batch}", batch_size=batch)
        for number, tensor in enumerate(inputs):
            kind = pb2.DataType.Value(tensor.data_type)
            content = {"zero_data": True} if number else {"input_data_file": tensor.name}
            warmup.inputs[tensor.name].CopyFrom(pb2.ModelWarmup.Input(data_type=kind, dims=tensor.dims, **content))
    return str(text_format.MessageToString(message))


def _described(pb2: Any, tensor: TritonTensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": pb2.DataType.Value(tensor.data_type), "dims": tensor.dims}
