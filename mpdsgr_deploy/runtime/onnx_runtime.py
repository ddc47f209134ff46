"""A network on onnxruntime as a Predictor."""

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.runtime.image_noise import NoiseSource
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.session import CPU, Session, failure


class OnnxRuntime(AbstractContextManager["OnnxRuntime"]):
    """A Predictor for an ONNX file. Threads may share it, and its session closes at the end of a with block.

    model: the file or its content; `source` names it in error messages. provider: an execution provider of onnxruntime.
    noise: the source of a stochastic network's noise inputs. settings: threads of the CPU provider, and how many images
    are computed at once; by default one thread per core, and the whole batch. Raises InputError if this machine cannot
    run the provider, and if the noise does not fit the network.
    """

    def __init__(
        self,
        model: Path | onnx.ModelProto,
        provider: str = CPU,
        noise: NoiseSource | None = None,
        *,
        settings: RuntimeSettings | None = None,
        source: object = None,
    ) -> None:
        settings = RuntimeSettings() if settings is None else settings
        source = model if source is None else source
        self._session = Session(model, provider, source=source, threads=settings.threads)
        (self._input, shape), *others = self._session.inputs.items()
        self._shape = shape[1:]
        self._noise = NoiseSource() if noise is None else noise
        self._noise.require({name: shape[1:] for name, shape in others}, source)
        self._chunk = settings.chunk

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._computed(x, self._session.outputs[:1])[0]

    def answers(self, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return every output of the network, each [B, ...], for images float32 [B, C, H, W] in [0, 1].

        Raises InputError for other images, and if onnxruntime fails.
        """
        return self._computed(x, self._session.outputs)

    def _computed(self, x: NDArray[np.float32], outputs: list[str]) -> list[NDArray[np.float32]]:
        check_images(x, self._shape)
        size = self._chunk or len(x)
        try:
            parts = [self._run(x[start : start + size], outputs) for start in range(0, len(x), size)]
        except Exception as error:  # onnxruntime's errors share no public base class
            raise failure(f"fails on a batch of {len(x)}", error) from error
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def _run(self, x: NDArray[np.float32], outputs: list[str]) -> list[NDArray[np.float32]]:
        return self._session({self._input: x, **self._noise(x)}, outputs)

    def __exit__(self, *exception: object) -> None:
        self._session.__exit__()
