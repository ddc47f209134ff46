"""onnxruntime, with its silent fallback refused: asked for CUDA it uses CUDA or raises."""

import os
import re
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, OutOfMemory, one_line
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.runtime.half import for_cpu
from mpdsgr_deploy.runtime.images import check_images
from mpdsgr_deploy.runtime.noise import NoiseSource
from mpdsgr_deploy.runtime.settings import Settings

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
EXTRAS = {CPU: "cpu", CUDA: "gpu", TENSORRT: "gpu"}
DEVICES = {CPU: "cpu", CUDA: "cuda", TENSORRT: "cuda"}
NEEDS = {CUDA: "an NVIDIA driver, CUDA 13 and cuDNN 9", TENSORRT: "an NVIDIA driver, CUDA 13 and TensorRT 10, not 11"}
OPTIONS = {CPU: {}, CUDA: {"use_tf32": "0"}, TENSORRT: {}}  # TF32 would flip spikes
# of its arena; of CUDA; of cuDNN and cuBLAS; of C++
NO_MEMORY = re.compile(r"Failed to allocate memory|out of ?memory|ALLOC_FAILED|bad_alloc|bad allocation", re.IGNORECASE)


class OnnxRuntime:
    """A Predictor on an ONNX file. A context manager: the session ends with the block. Threads may share it.

    provider: an onnxruntime execution provider; InputError if this machine cannot run it. noise: for a stochastic
    network the source of its noise inputs; InputError if it does not fit them. settings: threads of the CPU provider,
    and how many images are computed at once; by default one a core, and all of a batch.
    """

    def __init__(
        self,
        model: Path,
        provider: str = CPU,
        noise: NoiseSource | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        ort = need("onnxruntime", EXTRAS[provider])
        if provider not in ort.get_available_providers():
            raise InputError(
                f"this onnxruntime has no {provider}; install it with: pip install 'mpdsgr-deploy[{EXTRAS[provider]}]' "
                f"(uninstall the other onnxruntime package first, they overwrite each other)"
            )
        settings = Settings() if settings is None else settings
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what is an error is also raised; on stderr it would be said twice
        options.intra_op_num_threads = settings.threads or 0  # 0: one a core
        if provider != CPU:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if provider == TENSORRT:
            os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # the provider has no option against TF32; read by its libraries
        try:
            network = for_cpu(model) if provider == CPU else str(model)
            self._session: Any = ort.InferenceSession(network, options, providers=[(provider, OPTIONS[provider])])
        except Exception as error:  # onnxruntime's errors share no public base class
            raise _failure(f"cannot load {model} on {provider}", error) from error
        used = self._session.get_providers()[0]
        if used != provider:
            raise InputError(
                f"asked for {provider}, onnxruntime fell back to {used}: {provider} needs {NEEDS[provider]}; "
                f"see `mpdsgr doctor`"
            )
        images, *others = self._session.get_inputs()
        self._input, self._shape = images.name, tuple(images.shape[1:])
        self._noise = NoiseSource() if noise is None else noise
        self._noise.require({entry.name: entry.shape[1:] for entry in others}, model)
        self._output = self._session.get_outputs()[0].name
        self._device, self._chunk = DEVICES[provider], settings.chunk
        self._value = ort.OrtValue.ortvalue_from_numpy

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        check_images(x, self._shape)
        size = self._chunk or len(x)
        try:
            return np.concatenate([self._logits(x[start : start + size]) for start in range(0, len(x), size)])
        except Exception as error:  # onnxruntime's errors share no public base class
            raise _failure(f"fails on a batch of {len(x)}", error) from error

    def _logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [n, K]. Input and output are bound where the provider computes: one copy to it and one back."""
        binding = self._session.io_binding()  # one a call: it is what makes sharing between threads safe
        for name, array in {self._input: np.ascontiguousarray(x), **self._noise(x)}.items():
            binding.bind_ortvalue_input(name, self._value(array, self._device))
        binding.bind_output(self._output, self._device)
        self._session.run_with_iobinding(binding)
        (logits,) = binding.copy_outputs_to_cpu()
        return logits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._session = None


def _failure(what: str, error: Exception) -> InputError:
    """What to raise in place of onnxruntime's own error."""
    kind, advice = InputError, "see `mpdsgr doctor`"
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        kind, advice = OutOfMemory, "it has too little memory; free some or use a smaller batch"
    return kind(f"onnxruntime {what}: {one_line(error)}; {advice}")
