"""A model's config.pbtxt for Triton: made as a protobuf message, and checked beyond what protobuf checks.

Triton's own checks come when a server starts, and some never: it loads a model whose labels are one line short, or
whose preferred batch no engine takes.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto

from mpdsgr_deploy.errors import one_line
from mpdsgr_deploy.lookup import need

CONFIG, LABELS, VERSION, WARMUP = "config.pbtxt", "labels.txt", "1", "warmup"
PLATFORMS = {"onnxruntime_onnx": "model.onnx", "tensorrt_plan": "model.plan"}  # and the file Triton looks for
TYPES: dict[int, str] = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.FLOAT16: "TYPE_FP16"}
BYTES = {"TYPE_FP32": 4, "TYPE_FP16": 2}


class TritonTensor(NamedTuple):
    """An input or output as Triton describes it. dims: without the batch; 0 where a network leaves them open."""

    name: str
    data_type: str
    dims: tuple[int, ...]


class TritonPlan(NamedTuple):
    """How one network is to run. preferred: batches to fill; engines: file name by compute capability, if it matters.

    gpus: how many; 0: on the CPU. parameters: notes for people; backends skip what they do not know.
    """

    name: str
    platform: str
    largest: int
    preferred: Sequence[int]
    gpus: int
    engines: Mapping[str, str]
    parameters: Mapping[str, str]


def library() -> Any:
    """Triton's own description of a configuration. Raises InputError naming the extra where it is missing."""
    return need("tritonclient.grpc.model_config_pb2", "serve")


def tensors(network: onnx.ModelProto) -> tuple[list[TritonTensor], list[TritonTensor]]:
    """A network's inputs and outputs."""
    weights = {tensor.name for tensor in network.graph.initializer}
    inputs = [_tensor(value) for value in network.graph.input if value.name not in weights]
    return inputs, [_tensor(value) for value in network.graph.output]


def _tensor(value: onnx.ValueInfoProto) -> TritonTensor:
    kind = value.type.tensor_type
    dims = tuple(dim.dim_value for dim in kind.shape.dim)
    return TritonTensor(value.name, TYPES.get(kind.elem_type, str(kind.elem_type)), dims[1:])


def config(plan: TritonPlan, network: onnx.ModelProto) -> str:
    """The text of config.pbtxt.

    `dynamic_batching` says no more than which batches to fill: a queue policy of any kind was seen to hold requests for
    half a second. The first input is warmed up with an image from a file, others, which are noise, with zeros.
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


def problems(text: str, directory: Path, network: onnx.ModelProto) -> list[str]:
    """What is wrong with `text` as the config.pbtxt of the model in `directory`, which runs `network`; empty: nothing.

    directory: with its version 1, labels and warm-up data in place.
    """
    pb2 = library()
    text_format = need("google.protobuf.text_format", "serve")
    try:
        message = text_format.Parse(text, pb2.ModelConfig())
    except text_format.ParseError as error:
        return [f"not a model configuration: {one_line(error)}"]
    inputs, outputs = tensors(network)
    return [
        *_of_files(message, directory),
        *_of_tensors(pb2, "input", message.input, inputs),
        *_of_tensors(pb2, "output", message.output, outputs),
        *_of_labels(message, directory),
        *_of_batching(message, network),
        *_of_instances(pb2, message),
        *_of_warmup(pb2, message, inputs, directory),
    ]


def _of_files(message: Any, directory: Path) -> list[str]:
    faults = []
    if message.name != directory.name:
        faults.append(f"name {message.name!r} is not that of its directory, {directory.name!r}")
    if message.platform not in PLATFORMS or message.backend:
        return [*faults, f"platform {message.platform!r} is none of {', '.join(PLATFORMS)}"]
    engines = dict(message.cc_model_filenames)
    if engines and message.platform != "tensorrt_plan":
        faults.append("cc_model_filenames is for engines only")
    faults += [f"{key!r} is no compute capability" for key in engines if not re.fullmatch(r"\d+\.\d", key)]
    for name in engines.values() or [message.default_model_filename or PLATFORMS[message.platform]]:
        if "/" in name or not (directory / VERSION / name).is_file():
            faults.append(f"there is no file {VERSION}/{name}")
    return faults


def _of_tensors(pb2: Any, kind: str, listed: Any, of_network: Sequence[TritonTensor]) -> list[str]:
    described = [TritonTensor(t.name, pb2.DataType.Name(t.data_type), tuple(t.dims)) for t in listed]
    if Counter(described) == Counter(of_network):
        return [
            f"{kind} {t.name}: dimension {dim} is not fixed" for t in described for dim in t.dims if dim < 1
        ]  # Triton takes -1 for any size, but no network of ours has one
    names = [t.name for t in described]
    faults = [f"{kind} {name!r} is there {n} times" for name, n in Counter(names).items() if n > 1]
    by_name = {t.name: t for t in of_network}
    for tensor in described:
        faults += [f"{kind} {tensor.name}: dimension {dim} is below -1" for dim in tensor.dims if dim < -1]
        if tensor.name not in by_name:
            faults.append(f"the network has no {kind} {tensor.name!r}")
        elif tensor != by_name[tensor.name]:
            faults.append(f"{kind} {_said(tensor)} is {_said(by_name[tensor.name])} in the network")
    return faults + [f"{kind} {name!r} of the network is missing" for name in by_name if name not in names]


def _said(tensor: TritonTensor) -> str:
    return f"{tensor.name} {tensor.data_type} {list(tensor.dims)}"


def _of_labels(message: Any, directory: Path) -> list[str]:
    faults = []
    for output in message.output:
        file = directory / output.label_filename
        if not output.label_filename or not file.is_file():
            faults.append(f"output {output.name} has no file of labels")
            continue
        count = len(file.read_text(encoding="utf-8").splitlines())
        if count != prod(output.dims):
            faults.append(f"{output.label_filename} has {count} labels for {prod(output.dims)} logits")
    return faults


def _of_batching(message: Any, network: onnx.ModelProto) -> list[str]:
    faults, largest, batching = [], message.max_batch_size, message.dynamic_batching
    if largest < 1:
        faults.append(f"max_batch_size {largest} is not at least 1")
    for value in (*network.graph.input, *network.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value"):
            faults.append(f"{value.name} takes batches of {dims[0].dim_value} only")
    if not message.HasField("dynamic_batching"):
        faults.append("dynamic_batching is missing: requests would run one by one")
    further = [field.name for field, _ in batching.ListFields() if field.name != "preferred_batch_size"]
    faults += [f"dynamic_batching.{name} must not be set: it delays requests" for name in further]
    sizes = list(batching.preferred_batch_size)
    return faults + [f"preferred batch {n} is not in 1 to {largest}" for n in sizes if not 1 <= n <= largest]


def _of_instances(pb2: Any, message: Any) -> list[str]:
    kinds = pb2.ModelInstanceGroup
    faults = [] if message.instance_group else ["there is no instance_group"]
    for group in message.instance_group:
        if group.count < 1:
            faults.append(f"an instance group's count {group.count} is not at least 1")
        if group.kind not in (kinds.KIND_CPU, kinds.KIND_GPU):
            faults.append("an instance group's kind is neither KIND_CPU nor KIND_GPU")
        if group.gpus and group.kind != kinds.KIND_GPU:
            faults.append("an instance group has gpus, but not KIND_GPU")
        if message.platform == "tensorrt_plan" and group.kind != kinds.KIND_GPU:
            faults.append("an engine runs on a GPU only")
        if min(group.gpus, default=0) < 0 or len(set(group.gpus)) < len(group.gpus):
            faults.append(f"gpus {list(group.gpus)} are not different numbers from 0")
    return faults


def _of_warmup(pb2: Any, message: Any, inputs: Sequence[TritonTensor], directory: Path) -> list[str]:
    faults = []
    for sample in message.model_warmup:
        if not 1 <= sample.batch_size <= message.max_batch_size:
            faults.append(f"warm-up batch {sample.batch_size} is not in 1 to {message.max_batch_size}")
        samples = {TritonTensor(k, pb2.DataType.Name(v.data_type), tuple(v.dims)): v for k, v in sample.inputs.items()}
        if set(samples) != set(inputs):
            faults.append(f"warm-up {sample.name!r} does not have the network's inputs")
        for tensor, value in samples.items():
            file, size = directory / WARMUP / value.input_data_file, BYTES.get(tensor.data_type, 0) * prod(tensor.dims)
            if value.input_data_file and (not file.is_file() or file.stat().st_size != size):
                faults.append(f"there is no file {WARMUP}/{value.input_data_file} of {size} bytes")
    return faults
