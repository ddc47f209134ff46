"""Build an engine from an ONNX file with TensorRT or TensorRT-RTX, and store it in the bundle.

Networks are strongly typed: the ONNX file fixes every precision. The exception, TF32 in float32 products, is switched
off, because its ten bits of mantissa would flip spikes.

A TensorRT engine belongs to one GPU model and one version of TensorRT. A TensorRT-RTX engine belongs to one version of
TensorRT-RTX and to no GPU: it is built without one, for the compute capabilities for which the library has kernels, and
is compiled for the machine's GPU when it is opened. `Prepared.machine` therefore names a GPU for TensorRT only.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.bundle import Bundle, Prepared
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.tensorrt import cuda
from mpdsgr_deploy.runtime.tensorrt.library import (
    LIBRARIES,
    failure,
    find_targets,
    listener,
    load,
    one_line_message,
    without_collection,
)

BatchSizes = tuple[int, int, int]  # smallest, optimal and largest batch size
# The newest opset that TensorRT 10.16 to 11.4 are documented to read. Their parsers accept newer opsets without a
# warning, and give an operator whose meaning has changed its old meaning.
MAX_OPSET = 24
BATCH: BatchSizes = (1, 32, 128)  # the default


@without_collection()
def build_engine(
    backend: str, model: Path, batch: BatchSizes, timing_cache: Path | None = None, targets: Sequence[str] = ()
) -> bytes:
    """Return the serialised engine of the ONNX file `model`.

    batch: the range of the first dimension of every input. timing_cache: the file where TensorRT stores its
    measurements, so that the next build is quick; TensorRT-RTX measures nothing. targets: GPUs such as "h200" or
    compute capabilities such as "8.9" that TensorRT-RTX compiles for; default: all that it supports from 8.0 on.

    Raises InputError for batch sizes that are not in order, for unknown targets, for a missing library, and for a file
    that cannot be read or built; it names the node and its operator if one is refused.
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
    """Fill `network` from the file. Raises InputError with the parser's first error."""
    content = model.read_bytes()
    try:
        opsets = {entry.domain: entry.version for entry in onnx.load_model_from_string(content).opset_import}
    except Exception:  # protobuf's DecodeError, of a package without types
        raise InputError(f"{model} is not an ONNX file; export again") from None
    if opsets.get("", 0) > MAX_OPSET:
        raise InputError(
            f"{model} has opset {opsets['']}, and {backend} reads opsets up to {MAX_OPSET}; export with an older opset"
        )
    parser = trt.OnnxParser(network, logger)
    if parser.parse(content):
        return
    if not parser.num_errors:
        raise failure(logger, f"{backend} cannot read {model}", "export again")
    refused = parser.get_error(0)
    reason = str(refused.code()).partition(".")[2].replace("_", " ").lower()
    lines = [one_line_message(line) for line in refused.desc().splitlines()]
    # if there are several lines, the first only repeats the node's name
    detail = lines[-1] if len(lines) < 2 else lines[1]
    node = f"node {refused.node_name() or refused.node()} ({refused.node_operator()})"
    detail = "it does not have this operator" if detail == "false" else detail
    raise InputError(f"{backend} refuses {node} of {model}: {reason}, {detail}; use another backend or precision")


def _profile(builder: Any, network: Any, batch: BatchSizes) -> Any:
    """Return an optimisation profile of the inputs' shapes, whose first dimension alone must be dynamic.

    Raises InputError if it is not, or if another dimension is.
    """
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
        log.warning("the timing cache was not saved, so the next build will take as long as this one: %s", error)


def machine(backend: str) -> dict[str, str]:
    """Return what an engine depends on: the library's version and, for TensorRT, the GPU.

    Raises InputError if the library or, for TensorRT, a GPU is missing.
    """
    version = str(load(backend).__version__)
    if backend == "tensorrt-rtx":
        return {"tensorrt-rtx": version}
    gpu, capability = cuda.gpu(LIBRARIES[backend].extra)
    return {"gpu": gpu, "compute_capability": capability, "tensorrt": version}


def prepare(
    backend: str, bundle: Bundle, precision: str, batch: BatchSizes | None = None, targets: Sequence[str] = ()
) -> tuple[Bundle, Prepared]:
    """Build an engine of a bundle's network, and return the bundle with the engine, and the engine's manifest entry.

    batch: the range of batch sizes; None: BATCH. targets: as for `build_engine`. Raises InputError as `build_engine`
    and `machine` do, and for a precision that the bundle does not have.
    """
    model = bundle.variant(precision)
    this_machine = machine(backend)
    profile = batch or BATCH
    timings = timing_cache(this_machine) if backend == "tensorrt" else None
    plan = build_engine(backend, model, profile, timings, targets)
    sha = bundle.model_sha256(precision)
    prepared = Prepared(backend=backend, precision=precision, model_sha256=sha, machine=this_machine, batch=profile)
    added = bundle.add(prepared, plan)
    return added, added.manifest.prepared[-1]


def timing_cache(here: dict[str, str]) -> Path:
    """Return the file in the user's cache for TensorRT's measurements on one kind of machine."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mpdsgr-deploy" / ("-".join(here.values()).replace(" ", "-").replace("/", "-") + ".timing")


def widest(engine: Prepared) -> tuple[int, int]:
    """Return a key by which engines are sorted: those of the smallest MIN first, of these those of the largest MAX."""
    return (engine.batch[0], -engine.batch[2]) if engine.batch else (0, 0)


def find(backend: str, bundle: Bundle, precision: str, here: dict[str, str]) -> Prepared:
    """Return the manifest entry of the engine to run here: of those that fit, that of smallest MIN, then largest MAX.

    here: the result of `machine`. Raises InputError with the command that builds an engine, if there is none or if all
    belong to another network, GPU or version.
    """
    command = f"mpdsgr build {bundle.path} --backend {backend} --precision {precision}"
    sha = bundle.model_sha256(precision)
    engines = bundle.prepared(backend, precision)
    if not engines:
        raise InputError(f"{bundle.path} holds no {backend} engine of {precision}; build it here with: {command}")
    fitting = [p for p in engines if p.model_sha256 == sha and p.machine == here and p.batch and p.file]
    if fitting:
        return min(fitting, key=widest)
    last = engines[-1]
    profile = ",".join(map(str, last.batch or BATCH))
    if last.model_sha256 != sha:
        why = f"was built from another {bundle.manifest.variants[precision].file}"
    else:
        differing = {k for k in {*last.machine, *here} if last.machine.get(k) != here.get(k)}
        there, now = (", ".join(f"{k} {m.get(k, 'unknown')}" for k in sorted(differing)) for m in (last.machine, here))
        why = f"was built for {there} and this machine has {now}" if differing else "names no file or no batches"
    raise InputError(f"the {backend} engine of {precision} {why}; build it again with: {command} --batch {profile}")
