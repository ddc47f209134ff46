"""Build an engine from an ONNX file, by TensorRT or TensorRT-RTX.

Networks are strongly typed: the ONNX file fixes every precision. TF32 in float32 products, the one exception, is
switched off, because its ten bits of mantissa would flip spikes.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.tensorrt.library import (
    failure,
    find_targets,
    listener,
    load,
    one_line_message,
    without_collection,
)

BatchSizes = tuple[int, int, int]  # smallest, best, largest
# What TensorRT 10.16 to 11.4 are documented to read. Their parsers accept newer ones without a warning and give an
# operator whose meaning has changed its old meaning.
MAX_OPSET = 24


@without_collection()
def build_engine(
    backend: str, model: Path, batch: BatchSizes, timing_cache: Path | None = None, targets: Sequence[str] = ()
) -> bytes:
    """Build the serialized engine of `model` for batch sizes `batch`, the first dimension of every input.

    timing_cache: where TensorRT keeps its measurements, so that the next build is quick; TensorRT-RTX measures nothing.
    targets: GPUs or compute capabilities that TensorRT-RTX compiles for; default: all that it supports from 8.0 on.
    Raises InputError, which names node and operator where one is refused.
    """
    _check_batch(batch)
    trt = load(backend)
    capabilities = find_targets(trt, backend, targets)
    logger = listener(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, logger, network, model, backend)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: the condition for capturing CUDA graphs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for number, capability in enumerate(capabilities):
            config.set_compute_capability(capability, number)
    if timing_cache is not None:
        _read_timings(config, timing_cache)
    config.add_optimization_profile(_profile(builder, network, batch))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise failure(logger, f"{backend} cannot build an engine of {model}", "try another backend or precision")
    if timing_cache is not None:
        _write_timings(config, timing_cache)
    return bytes(plan)


def _check_batch(batch: BatchSizes) -> None:
    smallest, best, largest = batch
    if not 1 <= smallest <= best <= largest < 2**31:
        raise InputError(f"--batch {smallest},{best},{largest}: MIN,OPT,MAX must satisfy 1 <= MIN <= OPT <= MAX < 2^31")


def _parse(trt: ModuleType, logger: Any, network: Any, model: Path, backend: str) -> None:
    """Fill `network` from the file, or raise InputError with the first thing the parser refuses."""
    content = model.read_bytes()
    try:
        opsets = {entry.domain: entry.version for entry in onnx.load_model_from_string(content).opset_import}
    except Exception:  # protobuf's DecodeError, of a package without types
        raise InputError(f"{model} is not an ONNX file; export again") from None
    if opsets.get("", 0) > MAX_OPSET:
        raise InputError(f"{model} has opset {opsets['']}, {backend} reads up to {MAX_OPSET}; export with an older one")
    parser = trt.OnnxParser(network, logger)
    if parser.parse(content):
        return
    if not parser.num_errors:
        raise failure(logger, f"{backend} cannot read {model}", "export again")
    refused = parser.get_error(0)
    reason = str(refused.code()).partition(".")[2].replace("_", " ").lower()
    lines = [one_line_message(line) for line in refused.desc().splitlines()]
    detail = lines[-1] if len(lines) < 2 else lines[1]  # the first of several lines only repeats the node's name
    node = f"node {refused.node_name() or refused.node()} ({refused.node_operator()})"
    detail = "an operator it does not have" if detail == "false" else detail
    raise InputError(f"{backend} refuses {node} of {model}: {reason}, {detail}; use another backend or precision")


def _profile(builder: Any, network: Any, batch: BatchSizes) -> Any:
    """Return the shapes to optimise for. Raises InputError if a dimension other than the first is dynamic."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if not len(tensor.shape):  # a scalar, such as an attack graph's width
            continue
        first, *rest = tensor.shape
        if first != -1 or -1 in rest:
            raise InputError(f"input {tensor.name} is {list(tensor.shape)}; only the first dimension may be dynamic")
        profile.set_shape(tensor.name, *((count, *rest) for count in batch))
    return profile


def _read_timings(config: Any, path: Path) -> None:
    """Give the builder the measurements of earlier builds; a cache that is damaged or of another version is ignored."""
    for content in (path.read_bytes() if path.exists() else b"", b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _write_timings(config: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, bytes(config.get_timing_cache().serialize()))
    except (OSError, InputError) as error:
        log.warning("the next build will take as long as this one: %s", error)
