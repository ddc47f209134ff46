"""An onnxruntime session without silent fallback: asked for CUDA, it uses CUDA or raises an error.

Providers may be installed as separate wheels (plug-ins). By onnxruntime's packaging guide such a wheel holds a module
onnxruntime_ep_NAME with `get_library_path`, and `get_ep_names` or `get_ep_name`. `get_available_providers` does not
list such providers; `get_ep_devices` does once they are registered.
"""

import io
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, OutOfMemory, one_line
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.float16_on_cpu import for_cpu

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
EXTRAS = {CPU: "cpu", CUDA: "gpu", TENSORRT: "gpu"}
DEVICES = {CPU: "cpu", CUDA: "cuda", TENSORRT: "cuda"}
NEEDS = {
    CUDA: "needs an NVIDIA driver, CUDA 13 and cuDNN 9",
    TENSORRT: "needs an NVIDIA driver, CUDA 13 and TensorRT 10 (libnvinfer.so.10), not the 11 that the extra tensorrt "
    "brings: pip install 'tensorrt>=10.16,<11'",
}
OPTIONS = {CPU: {}, CUDA: {"use_tf32": "0"}, TENSORRT: {}}  # TF32 would flip spikes
# the messages of onnxruntime's arena, of CUDA, of cuDNN and cuBLAS, and of C++
NO_MEMORY = re.compile(r"Failed to allocate memory|out of ?memory|ALLOC_FAILED|bad_alloc|bad allocation", re.IGNORECASE)
PREFIX = "onnxruntime_ep_"  # of the modules of plug-ins
# The names of a provider's devices: its own, and the one that its first plug-in builds gave it
NAMES = {"CUDAExecutionProvider": ("CUDAExecutionProvider", "CudaPluginExecutionProvider")}


class Session(AbstractContextManager["Session"]):
    """One network on one provider. Threads may share it, and the end of a with block closes it.

    network: an ONNX file, or its content; source: its name in messages. threads: those of the CPU provider; None:
    `usual_threads`. packs: keep a second copy of the weights of linear layers, in the order in which a product reads
    them; otherwise they are packed in every run.

    inputs: the shape of each input by name, in order; a dynamic dimension is a string. outputs: the names of the
    outputs. Raises InputError if this machine cannot run the provider or the network.
    """

    def __init__(
        self,
        network: Path | onnx.ModelProto,
        provider: str,
        *,
        source: object,
        threads: int | None = None,
        packs: bool = True,
    ) -> None:
        ort = need("onnxruntime", EXTRAS[provider])
        if provider != CPU:
            preload_libraries(ort)
        built_in = provider in ort.get_available_providers()
        devices = [] if built_in else plugin_devices(ort, provider)
        if not built_in and not devices:
            raise InputError(
                f"this onnxruntime has no {provider}; install it with: pip install 'mpdsgr-deploy[{EXTRAS[provider]}]' "
                f"(uninstall the other onnxruntime package first, they overwrite each other), or add its plug-in"
            )
        options = session_options(ort, provider, threads, packs=packs)
        if provider == TENSORRT:
            os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # the provider's libraries read this; it has no option for TF32
        try:
            network = for_cpu(network) if provider == CPU else network
            loaded = network.SerializeToString() if isinstance(network, onnx.ModelProto) else str(network)
            if built_in:
                self._session: Any = ort.InferenceSession(loaded, options, providers=[(provider, OPTIONS[provider])])
            else:
                options.add_provider_for_devices(devices[:1], OPTIONS[provider])
                self._session = ort.InferenceSession(loaded, options)
        except Exception as error:  # onnxruntime's errors share no public base class
            hint = f" (it {NEEDS[provider]})" if provider in NEEDS else ""
            raise failure(f"cannot load {source} on {provider}{hint}", error) from error
        # onnxruntime keeps a copy of all weights for a fallback, which is refused here
        self._session._model_bytes = None
        used = self._session.get_providers()[0]
        if used not in (provider, *(device.ep_name for device in devices)):
            raise InputError(
                f"onnxruntime used {used} instead of {provider}, which {NEEDS[provider]}; see `mpdsgr doctor`"
            )
        self.inputs: dict[str, tuple[Any, ...]] = {x.name: tuple(x.shape) for x in self._session.get_inputs()}
        self.outputs: list[str] = [y.name for y in self._session.get_outputs()]
        # with a plug-in, onnxruntime itself cannot copy to the device, but the session does
        self._device = DEVICES[provider] if built_in else DEVICES[CPU]
        self._value = ort.OrtValue.ortvalue_from_numpy

    def __call__(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Return the named outputs in new arrays. inputs: an array for every input, by name.

        Inputs and outputs are bound on the device, so that each is copied once. Raises onnxruntime's errors.
        """
        binding = self._session.io_binding()  # one per call, so that threads can share the session
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._value(np.asarray(array, order="C"), self._device))
        for name in outputs:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        arrays: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return arrays

    def __exit__(self, *exception: object) -> None:
        self._session = None


def session_options(ort: Any, provider: str, threads: int | None, *, packs: bool) -> Any:
    """Return the SessionOptions for the arguments of `Session`. ort: the module onnxruntime."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well; printing them would repeat them
    options.intra_op_num_threads = threads or usual_threads()
    # otherwise threads keep cores busy for a while after every call, even if a server only waits for the next request
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not packs:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def preload_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from NVIDIA's wheels: the provider does not search there, but finds loaded libraries.

    If one is missing, the provider's own error names it.
    """
    # onnxruntime prints to stdout, which belongs to the output of commands
    with redirect_stdout(io.StringIO()), suppress(RuntimeError, OSError):
        getattr(ort, "preload_dlls", lambda: None)()


def usual_threads() -> int:
    """Return OMP_NUM_THREADS, which torch and BLAS obey but onnxruntime ignores; 0 if it is not set to one number.

    0 means one thread per core. Two processes with one thread per core each would spend their time waiting for one
    another.
    """
    try:
        return max(0, int(os.environ.get("OMP_NUM_THREADS", "0")))
    except ValueError:  # a list, one number for each level of nested regions
        return 0


def failure(what: str, error: Exception) -> InputError:
    """Return the error to raise instead of onnxruntime's own: OutOfMemory if memory ran out, otherwise InputError.

    what: what onnxruntime did, as the predicate of a sentence.
    """
    kind, advice = InputError, "see `mpdsgr doctor`"
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        kind, advice = OutOfMemory, "there is too little memory; free some or use a smaller batch"
    return kind(f"onnxruntime {what}: {one_line(error)}; {advice}")


def plugin_devices(ort: Any, provider: str) -> list[Any]:
    """Return the devices of a provider's first installed plug-in; an empty list without one. ort: onnxruntime."""
    names = NAMES.get(provider, (provider,))
    for module in (name for _, name, _ in iter_modules() if name.startswith(PREFIX)):
        _register(ort, module)
    devices: list[Any] = getattr(ort, "get_ep_devices", list)()  # exists in onnxruntime 1.23 and later
    by_name = ([device for device in devices if device.ep_name == name] for name in names)
    return next(filter(None, by_name), [])


@cache
def _register(ort: Any, module: str) -> None:
    """Let onnxruntime load a plug-in's library, once per process; log a warning if it cannot."""
    try:
        plugin = import_module(module)
        ort.register_execution_provider_library(module, plugin.get_library_path())
    except Exception as error:  # a half-installed plug-in may raise any type; its provider is then missing
        log.warning("the onnxruntime plug-in %s cannot be used and is ignored: %s", module, one_line(error))
