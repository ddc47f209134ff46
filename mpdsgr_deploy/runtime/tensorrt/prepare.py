"""Engines in a bundle: built for one kind of machine, reused there, and refused on others.

A TensorRT engine belongs to one GPU model and one version of TensorRT. A TensorRT-RTX engine belongs to one version of
TensorRT-RTX and to no GPU: it is built without one, for the compute capabilities that the library has kernels for, and
compiled for the GPU at hand when it is opened. So `Prepared.machine` names a GPU for TensorRT only.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from mpdsgr_deploy.bundle import Bundle, Prepared
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime.tensorrt import cuda
from mpdsgr_deploy.runtime.tensorrt.engine import BatchSizes, build_engine
from mpdsgr_deploy.runtime.tensorrt.library import LIBRARIES, load

BATCH: BatchSizes = (1, 32, 128)


def machine(backend: str) -> dict[str, str]:
    """Return what an engine depends on: versions and, for TensorRT, the GPU. Raises InputError if that is missing."""
    version = str(load(backend).__version__)
    if backend == "tensorrt-rtx":
        return {"tensorrt-rtx": version}
    gpu = cuda.gpu(LIBRARIES[backend].extra)
    return {"gpu": gpu.name, "compute_capability": gpu.compute_capability, "tensorrt": version}


def prepare(
    backend: str, bundle: Bundle, precision: str, batch: BatchSizes | None = None, targets: Sequence[str] = ()
) -> tuple[Bundle, Prepared]:
    """Build an engine of a bundle's network for a range of batch sizes, and add it to the bundle.

    targets: GPUs or compute capabilities, see `build_engine`. Raises InputError as `build_engine` does, and if the
    precision, the library or, for TensorRT, a GPU is missing.
    """
    model = bundle.variant(precision)
    here = machine(backend)
    profile = batch or BATCH
    plan = build_engine(backend, model, profile, timing_cache(here) if backend == "tensorrt" else None, targets)
    sha = bundle.model_sha256(precision)
    prepared = Prepared(backend=backend, precision=precision, model_sha256=sha, machine=here, batch=profile)
    added = bundle.add(prepared, plan)
    return added, added.manifest.prepared[-1]


def timing_cache(here: dict[str, str]) -> Path:
    """Return the file, in the user's cache, for TensorRT's measurements of one kind of machine."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mpdsgr-deploy" / ("-".join(here.values()).replace(" ", "-").replace("/", "-") + ".timing")


def find(backend: str, bundle: Bundle, precision: str, here: dict[str, str]) -> Prepared:
    """Find the engine to run here: of those that fit, the one with the smallest MIN and then the largest MAX.

    Raises InputError with the command that builds one if there is none, or only engines of another network, GPU or
    version.
    """
    command = f"mpdsgr build {bundle.path} --backend {backend} --precision {precision}"
    sha = bundle.model_sha256(precision)
    engines = bundle.prepared(backend, precision)
    if not engines:
        raise InputError(f"{bundle.path} holds no {backend} engine of {precision}; build it here with: {command}")
    fitting = [p for p in engines if p.model_sha256 == sha and p.machine == here and p.batch and p.file]
    if fitting:
        return min(fitting, key=lambda p: (p.batch[0], -p.batch[2]) if p.batch else (0, 0))
    last = engines[-1]
    profile = ",".join(map(str, last.batch or BATCH))
    if last.model_sha256 != sha:
        why = f"was built from another {bundle.manifest.variants[precision].file}"
    else:
        differing = {k for k in {*last.machine, *here} if last.machine.get(k) != here.get(k)}
        there, now = (", ".join(f"{k} {m.get(k, 'unknown')}" for k in sorted(differing)) for m in (last.machine, here))
        why = f"was built for {there} and this machine has {now}" if differing else "names no file or no batches"
    raise InputError(f"the {backend} engine of {precision} {why}; build it again with: {command} --batch {profile}")
