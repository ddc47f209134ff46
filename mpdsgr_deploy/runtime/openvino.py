"""OpenVINO on a CPU: the fastest exact backend there, for float32 and for the int8 variant.

The precision hints bf16 and f16 round activations, which flips spikes, so the hint is always f32; int8 products are
int8 in the graph. Only with a static batch does OpenVINO fuse a neuron's operations into one kernel and join the T
steps in place (with a dynamic batch the same network takes 1.2 to 1.4 times as long). A network is therefore compiled
for the few batch sizes that any batch can be cut into, each when it is first needed, from a graph that `openvino_graph`
has rewritten without changing the logits. OpenVINO computes float16 in float32 without the roundings in between, so its
results are closer to float32 than those of a GPU.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, OutOfMemory, one_line
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.runtime.image_noise import NoiseSource
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.openvino_graph import rewrite

CHUNK = 8  # images per call; larger batches are hardly faster and need more memory
# never a lower precision than that of the graph
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}


class OpenVino(AbstractContextManager["OpenVino"]):
    """A Predictor for an ONNX file, on the CPU. The end of a with block frees the compiled networks.

    Threads may share it: one inference runs at a time, with all of `settings.threads`; `settings.chunk` images (default
    8) are computed at once. Raises InputError if the file cannot be read or has an operator unknown to OpenVINO, and if
    `noise` does not fit a stochastic network's inputs.
    """

    def __init__(
        self, model: Path, noise: NoiseSource | None = None, *, settings: RuntimeSettings | None = None
    ) -> None:
        openvino = need("openvino", "openvino")
        settings = RuntimeSettings() if settings is None else settings
        self._model, self._core, self._lock = model, openvino.Core(), threading.Lock()
        self._chunk = settings.chunk or CHUNK
        # one inference at a time, with all threads
        self._options: dict[str, Any] = {**EXACT, "PERFORMANCE_HINT": "LATENCY"}
        if settings.threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = settings.threads
        try:
            self._network: Any = self._core.read_model(io.BytesIO(rewrite(onnx.load(model)).SerializeToString()))
        except Exception as error:  # errors of OpenVINO and protobuf share no base class
            raise InputError(f"OpenVINO cannot load {model}: {reason(error)}") from error
        shapes = {
            port.any_name: tuple(d.get_length() for d in list(port.partial_shape)[1:]) for port in self._network.inputs
        }
        self._input = next(iter(shapes))
        self._shape = shapes.pop(self._input)
        self._noise = NoiseSource() if noise is None else noise
        self._noise.require(shapes, model)
        self._requests: dict[int, Any] = {}

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        check_images(x, self._shape)
        x = np.ascontiguousarray(x)
        with self._lock:
            return np.concatenate([self._logits(x[rows]) for rows in chunks(len(x), self._chunk)])

    def _logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits [n, K] of one chunk, copied from the request, whose buffer the next chunk overwrites."""
        feeds = {self._input: x, **self._noise(x)}
        try:
            request = self._requests.get(len(x)) or self._compile(len(x))
            request.infer(feeds, share_inputs=True)
        except Exception as error:  # OpenVINO's errors share no base class
            message = f"OpenVINO cannot run {self._model} in batches of {len(x)}: {reason(error)}"
            if isinstance(error, MemoryError) or "bad_alloc" in message:
                raise OutOfMemory(f"{message}; free some memory or use a smaller batch") from error
            raise InputError(message) from error
        logits: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
        return logits

    def _compile(self, batch: int) -> Any:
        self._network.reshape({port: [batch, *list(port.partial_shape)[1:]] for port in self._network.inputs})
        compiled = self._core.compile_model(self._network, "CPU", self._options)
        self._requests[batch] = compiled.create_infer_request()
        return self._requests[batch]

    def __exit__(self, *exception: object) -> None:
        self._requests.clear()


def chunks(batch: int, largest: int) -> Iterator[slice]:
    """Yield the rows of chunks of a batch: `largest` images each, then powers of two, so that few sizes occur."""
    start = 0
    while start < batch:
        remaining = batch - start
        size = largest if remaining >= largest else 1 << (remaining.bit_length() - 1)
        yield slice(start, start + size)
        start += size


def reason(error: Exception) -> str:
    """Return OpenVINO's error message on one line, without references to its source code."""
    lines = [line.strip() for line in str(error).splitlines()]
    sentences = [
        line for line in lines if line and not line.startswith(("Exception from", "Check ", "FrontEnd API", "To fac"))
    ]
    return one_line(" ".join(sentences) or error)
