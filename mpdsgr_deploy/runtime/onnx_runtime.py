"""onnxruntime, with its silent fallback refused: asked for CUDA it uses CUDA or raises."""

from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, OutOfMemory
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.runtime.images import check_images
from mpdsgr_deploy.runtime.noise import NoiseSource

CPU = "CPUExecutionProvider"
EXTRAS = {CPU: "cpu", "CUDAExecutionProvider": "gpu"}
OPTIONS = {CPU: {}, "CUDAExecutionProvider": {"use_tf32": "0"}}  # TF32 would flip spikes
NO_MEMORY = "Failed to allocate memory"  # of its arena, on every device


class OnnxRuntime:
    """A Predictor on an ONNX file. A context manager: the session ends with the block.

    provider: an onnxruntime execution provider; InputError if this machine cannot run it. noise: for a stochastic
    network the source of its noise inputs; InputError if it does not fit them.
    """

    def __init__(self, model: Path, provider: str = CPU, noise: NoiseSource | None = None) -> None:
        ort = need("onnxruntime", EXTRAS[provider])
        if provider not in ort.get_available_providers():
            raise InputError(
                f"this onnxruntime has no {provider}; install it with: pip install 'mpdsgr-deploy[{EXTRAS[provider]}]' "
                f"(uninstall the other onnxruntime package first, they overwrite each other)"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what is an error is also raised; on stderr it would be said twice
        if provider != CPU:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._session: Any = ort.InferenceSession(str(model), options, providers=[(provider, OPTIONS[provider])])
        except Exception as error:  # onnxruntime's errors share no public base class
            raise InputError(f"onnxruntime cannot load {model} on {provider}: {error}") from error
        used = self._session.get_providers()[0]
        if used != provider:
            raise InputError(f"asked for {provider}, onnxruntime fell back to {used}; see `mpdsgr doctor`")
        images, *others = self._session.get_inputs()
        self._input, self._shape = images.name, tuple(images.shape[1:])
        self._noise = NoiseSource() if noise is None else noise
        self._noise.require({entry.name: entry.shape[1:] for entry in others}, model)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        check_images(x, self._shape)
        try:
            (logits,) = self._session.run(None, {self._input: x, **self._noise(x)})
        except Exception as error:  # onnxruntime's errors share no public base class
            if NO_MEMORY in str(error):
                raise OutOfMemory(f"onnxruntime has too little memory for a batch of {len(x)}") from error
            raise
        return logits  # onnxruntime allocates a fresh array per run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._session = None
