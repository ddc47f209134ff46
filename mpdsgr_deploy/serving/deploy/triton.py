"""A Triton model repository from bundles.

NAME/config.pbtxt     inputs, outputs, batches, devices
NAME/labels.txt       for Triton's classification extension
NAME/warmup/          a golden image, which every instance answers before the model is ready
NAME/1/model.onnx     or model.plan, or one plan per compute capability

Triton checks no values. An ONNX network is written with a check in it, which answers images outside [0, 1] with NaN. An
engine cannot have such a check, so it answers them as if they were valid.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from mpdsgr_deploy import __version__
from mpdsgr_deploy.bundle import Bundle, NoiseInput, Prepared
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose, need
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.float16_on_cpu import for_cpu
from mpdsgr_deploy.runtime.tensorrt.engine import widest
from mpdsgr_deploy.serving.deploy.output_directory import output_directory
from mpdsgr_deploy.serving.deploy.triton_config import (
    CONFIG,
    LABELS,
    PLATFORMS,
    VERSION,
    WARMUP,
    config,
    guarded,
)
from mpdsgr_deploy.serving.source import Chosen

BACKENDS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
SUMS = "mpdsgr-triton.sha256"
LARGEST = 128  # the largest batch of a network for which no engine was built
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"


class Written(NamedTuple):
    """A model as it was written to a repository.

    largest: its largest batch; engines: the version of TensorRT by compute capability; noise: the inputs that clients
    must send.
    """

    name: str
    precision: str
    largest: int
    engines: dict[str, str]
    noise: tuple[NoiseInput, ...]


def write_repository(models: Sequence[Chosen], out: Path, backend: str = "onnxruntime", gpus: int = 0) -> list[Written]:
    """Write a model repository to the directory `out`, which does not exist or was written by an earlier call.

    backend: a key of BACKENDS; gpus: the number of GPUs that each model runs on, or 0 for the CPU. Raises InputError
    for an unknown backend, for networks and engines that Triton cannot use, and if `out` holds other files or cannot be
    written.
    """
    platform = choose("backend", BACKENDS, backend)
    if backend == "tensorrt" and not gpus:
        raise InputError("TensorRT engines run only on GPUs; give their number with --gpus")
    need("tritonclient.grpc", "serve")
    with output_directory(out, SUMS, "Triton model repository") as scratch:
        return [_write(scratch / model.name, model, platform, gpus) for model in models]


def _write(directory: Path, model: Chosen, platform: str, gpus: int) -> Written:
    bundle, manifest = model.bundle, model.bundle.manifest
    (directory / VERSION).mkdir(parents=True)
    (directory / WARMUP).mkdir()
    engines: dict[str, Prepared] = {}
    if platform == BACKENDS["tensorrt"]:
        network = onnx.load(bundle.variant(model.precision))
        engines = engines_of(bundle, model.precision)
        largest, preferred, files = _put_engines(directory / VERSION, bundle, engines)
    else:
        network = _checked_network(model, gpus)
        onnx.save(network, directory / VERSION / PLATFORMS[platform])
        built = [p.batch[2] for p in manifest.prepared if p.precision == model.precision and p.batch]
        largest, preferred, files = max(built, default=LARGEST), [], {}
    labels = [" ".join(label.split()) for label in manifest.labels]
    (directory / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    golden = np.ascontiguousarray(bundle.golden(model.precision)[0][0], dtype="<f4")
    (directory / WARMUP / manifest.input_name).write_bytes(golden.tobytes())
    notes = {
        "bundle_sha256": manifest.digest,
        "model_sha256": bundle.model_sha256(model.precision),
        "mpdsgr_deploy": __version__,
        "precision": model.precision,
    }
    text = config(
        network,
        name=model.name,
        platform=platform,
        largest=largest,
        preferred=preferred,
        gpus=gpus,
        engines=files,
        parameters=notes,
    )
    (directory / CONFIG).write_text(text, encoding="utf-8")
    versions = {capability: engine.machine["tensorrt"] for capability, engine in engines.items()}
    return Written(model.name, model.precision, largest, versions, manifest.noise)


def _checked_network(model: Chosen, gpus: int) -> onnx.ModelProto:
    network: Path | onnx.ModelProto = model.bundle.variant(model.precision)
    if not gpus:  # a CPU rounds to float16 only where the graph has a Cast
        network = for_cpu(network)
    network = onnx.load(network) if isinstance(network, Path) else network
    return guarded(network, model.bundle.manifest.input_name)


def _put_engines(
    directory: Path, bundle: Bundle, engines: dict[str, Prepared]
) -> tuple[int, list[int], dict[str, str]]:
    """Copy the engines; return the largest batch, preferred batches, and file names by compute capability.

    With a single engine there are no such names, because Triton finds it by its usual name.
    """
    files: dict[str, str] = {}
    if len(engines) > 1:
        files = {capability: f"model-{capability}.plan" for capability in engines}
    for capability, engine in engines.items():
        target = directory / files.get(capability, PLATFORMS[BACKENDS["tensorrt"]])
        shutil.copyfile(bundle.file(str(engine.file)), target)
    _, bests, largests = zip(*(engine.batch for engine in engines.values() if engine.batch), strict=True)
    largest = min(largests)
    # with the largest, because Triton would otherwise form no batch above the preferred one
    return largest, sorted({min(*bests, largest), largest}), files


def engines_of(bundle: Bundle, precision: str) -> dict[str, Prepared]:
    """Return the TensorRT engine for each compute capability, all of the newest version of TensorRT that has any.

    Raises InputError if there is no engine, if two kinds of GPU share a compute capability, by which alone Triton
    distinguishes GPUs, and if an engine does not take single images, because Triton does not pad batches.
    """
    command = f"mpdsgr build {bundle.path} --backend tensorrt --precision {precision}"
    sha = bundle.model_sha256(precision)
    built = [p for p in bundle.prepared("tensorrt", precision) if p.model_sha256 == sha and p.batch and p.file]
    fitting = [p for p in built if {"gpu", "compute_capability", "tensorrt"} <= set(p.machine)]
    if not fitting:
        raise InputError(
            f"{bundle.path} holds no TensorRT engine of {precision}; build one on a machine with the GPU that "
            f"will serve it: {command}"
        )
    newest = max((p.machine["tensorrt"] for p in fitting), key=_version)
    older = {p.machine["tensorrt"] for p in fitting} - {newest}
    if older:
        log.info(
            "engines of TensorRT %s are left out, because a server has only one version, here %s",
            ", ".join(older),
            newest,
        )
    chosen: dict[str, Prepared] = {}
    for engine in (p for p in fitting if p.machine["tensorrt"] == newest):
        capability = engine.machine["compute_capability"]
        other = chosen.setdefault(capability, engine)
        if other.machine["gpu"] != engine.machine["gpu"]:
            raise InputError(
                f"{bundle.path} holds engines for {other.machine['gpu']} and {engine.machine['gpu']}, both of compute "
                f"capability {capability}, which Triton cannot tell apart; deploy a bundle with one of them"
            )
        chosen[capability] = min(other, engine, key=widest)
    for engine in chosen.values():
        smallest, best, largest = engine.batch or (1, 1, 1)
        if smallest > 1:
            raise InputError(
                f"an engine in {bundle.path} takes no batches below {smallest}, but Triton also sends single "
                f"images; build it again with: {command} --batch 1,{best},{largest}"
            )
    return dict(sorted(chosen.items()))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())
