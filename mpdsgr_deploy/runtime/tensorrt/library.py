"""TensorRT and TensorRT-RTX: two modules with the same Python API, and their error messages."""

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from mpdsgr_deploy.errors import InputError, OutOfMemory, one_line
from mpdsgr_deploy.lookup import choose, need
from mpdsgr_deploy.progress import log


class Library(NamedTuple):
    """One of the two libraries: the extra that installs it, and the name of its Python module."""

    extra: str
    module: str


# The compute capabilities of GPUs, by the names that users may give
CAPABILITIES = {
    **{"t4": "7.5", "a100": "8.0", "a10": "8.6", "orin": "8.7", "l4": "8.9", "h100": "9.0", "h200": "9.0"},
    **{"b200": "10.0", "rtx-5090": "12.0", "dgx-spark": "12.1"},
}
LIBRARIES = {"tensorrt": Library("tensorrt", "tensorrt"), "tensorrt-rtx": Library("rtx", "tensorrt_rtx")}


def load(backend: str) -> ModuleType:
    """Return the Python module of a backend.

    Raises InputError for an unknown backend, and for a missing module, with the extra that installs it.
    """
    library = choose("backend", LIBRARIES, backend)
    return need(library.module, library.extra)


def compute_capabilities(trt: ModuleType) -> dict[str, Any]:
    """Return the members of TensorRT-RTX's enum of compute capabilities by texts such as "8.9"; empty for TensorRT."""
    kinds = getattr(trt, "ComputeCapability", None)
    members = {} if kinds is None else kinds.__members__
    return {f"{name[2:-1]}.{name[-1]}": kind for name, kind in members.items() if name.startswith("SM")}


def find_targets(trt: ModuleType, backend: str, targets: Sequence[str]) -> list[Any]:
    """Return the members of the library's enum for GPUs such as "h200" or compute capabilities such as "8.9".

    Raises InputError for a target that the library has no kernels for, and for any target with TensorRT.
    """
    kinds = compute_capabilities(trt)
    capabilities = {target: CAPABILITIES.get(target.lower(), target) for target in targets}
    for target, capability in capabilities.items():
        if capability not in kinds and not kinds:
            raise InputError(
                f"{backend} builds only for the GPU of this machine; leave --target out, and build on the target "
                "machine"
            )
        if capability not in kinds:
            raise InputError(
                f"{backend} {trt.__version__} has no kernels for {target} (compute capability {capability}), only for "
                f"{', '.join(kinds)}; use --backend tensorrt or onnxruntime-cuda there"
            )
    return [kinds[capability] for capability in capabilities.values()]


def listener(trt: ModuleType) -> Any:
    """Return an ILogger of `trt` that appends error messages to its list `errors`, and logs warnings at level debug.

    Calls that fail return None or False; only the logger gets the reason.
    """

    base: Any = trt.ILogger

    class ErrorListener(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                log.debug("%s: %s", trt.__name__, one_line_message(message))

    return ErrorListener()


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause Python's garbage collection in a with block, while TensorRT may call a listener.

    TensorRT calls a listener while it holds the lock that its destructors take, so a collection at that moment which
    frees objects of a failed call would deadlock. Only one thread may be in such a block at a time.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def failure(listener: Any, what: str, advice: str) -> InputError:
    """Return the error to raise for a failed call; it says `what` failed, the library's first message, and `advice`.

    It is OutOfMemory if memory ran out, otherwise InputError.
    """
    # messages with "catchCudaError" follow every error and add nothing
    messages = [message for message in listener.errors if "catchCudaError" not in message]
    text = one_line_message((messages or listener.errors or ["no reason was given"])[0])
    listener.errors.clear()  # otherwise a later failure would report this reason
    kind = OutOfMemory if re.search(r"out ?of ?memory|cudaError 2\b", " ".join(messages), re.IGNORECASE) else InputError
    return kind(f"{what}: {text}; {advice}")


def one_line_message(message: str) -> str:
    """Return a message without line breaks and without references to the library's source."""
    return one_line(re.sub(r"\bIn \S+ at /\S+:\d+", "", message))
