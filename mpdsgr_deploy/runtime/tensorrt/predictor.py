"""The Predictor for an engine: it cuts and pads batches, shares streams among threads, and keeps CUDA graphs.

The code that calls the GPU is in `cuda.py`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from queue import Empty, LifoQueue
from threading import Lock
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError, OutOfMemory
from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.runtime.image_noise import NoiseSource
from mpdsgr_deploy.runtime.tensorrt import cuda
from mpdsgr_deploy.runtime.tensorrt.engine import BatchSizes, find, machine

Array = NDArray[np.float32]
Noise = Callable[[Array], Mapping[str, Array]]
STREAMS = 4  # largest number of threads that run at the same time; each has its own activations
SIZES = 16  # batch sizes whose contexts and graphs a stream keeps


class Lane:
    """A stream and its executions by batch size; beyond SIZES of them, the least recently used is closed.

    The first batch of a size runs without a graph, as the warm-up that a capture needs; the second is captured. A size
    that occurs only once therefore costs no capture.
    """

    def __init__(self, stream: cuda.CudaStream) -> None:
        self._stream = stream
        self._executions: OrderedDict[int, cuda.CudaExecution] = OrderedDict()
        self._captured: set[int] = set()

    def __call__(self, feeds: Mapping[str, Array], smallest: int) -> Array:
        """Return the output [n, ...] in new memory, for n rows of every input; fewer than `smallest` are padded."""
        n = len(next(iter(feeds.values())))
        size = max(n, smallest)
        for name, rows in feeds.items():
            self._stream.inputs[name][:n] = rows
            self._stream.inputs[name][n:size] = 0
        execution = self._executions.pop(size, None)
        if execution is None:
            while len(self._executions) >= SIZES:
                oldest, dropped = self._executions.popitem(last=False)
                self._captured.discard(oldest)
                dropped.close()
            execution = self._stream.execution(size)
        elif size not in self._captured:
            execution.capture()
            self._captured.add(size)
        self._executions[size] = execution
        execution.run()
        return self._stream.output[:n].copy()

    def close(self) -> None:
        for execution in self._executions.values():
            execution.close()
        self._executions.clear()
        self._stream.close()


class TensorRT(AbstractContextManager["TensorRT"]):
    """A Predictor for an engine. Threads may share it, and the end of a with block frees the GPU's memory.

    stream: a function that opens one more stream; batch: the engine's batch sizes; shape: that of an image, (C, H,
    W); name: that of the input for images; noise: the source of a stochastic network's noise inputs.
    """

    def __init__(
        self,
        stream: Callable[[], cuda.CudaStream],
        batch: BatchSizes,
        shape: tuple[int, int, int],
        name: str,
        noise: Noise = lambda x: {},
    ) -> None:
        self._stream, self._batch, self._shape, self._name, self._noise = stream, batch, shape, name, noise
        self._lanes: list[Lane] = []
        self._free: LifoQueue[Lane] = LifoQueue()
        self._lock, self._most = Lock(), STREAMS

    @classmethod
    def from_bundle(cls, backend: str, bundle: Bundle, precision: str, noise: NoiseSource) -> Self:
        """Open the bundle's engine for this machine.

        Raises InputError with the command that builds one if none fits, and for noise that is not the engine's.
        """
        prepared = find(backend, bundle, precision, machine(backend))
        assert prepared.file is not None  # `find` returns only entries with a file and batch sizes
        assert prepared.batch is not None
        manifest, batch = bundle.manifest, prepared.batch
        profile = ",".join(map(str, batch))
        command = f"mpdsgr build {bundle.path} --backend {backend} --precision {precision} --batch {profile}"
        advice = f"build it again with: {command}"
        engine = cuda.Engine(backend, bundle.file(prepared.file).read_bytes(), advice)
        if engine.shapes.get(manifest.input_name) != manifest.input_shape:
            raise InputError(f"{prepared.file} does not take this bundle's images; {advice}")
        others = {name: engine.shapes[name] for name in engine.inputs if name != manifest.input_name}
        noise.require(others, prepared.file)
        return cls(lambda: cuda.CudaStream(engine, batch[2]), batch, manifest.input_shape, manifest.input_name, noise)

    def __call__(self, x: Array) -> Array:
        check_images(x, self._shape)
        smallest, _, largest = self._batch
        feeds = {self._name: x, **self._noise(x)}
        with self._lane() as lane:
            parts = [
                lane({name: rows[start : start + largest] for name, rows in feeds.items()}, smallest)
                for start in range(0, len(x), largest)
            ]
        return np.concatenate(parts)

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        """Reserve a lane for this thread: a free one, a new one, or the next one that another thread returns."""
        try:
            lane = self._free.get_nowait()
        except Empty:
            lane = self._new_lane() or self._free.get()
        try:
            yield lane
        finally:
            self._free.put(lane)

    def _new_lane(self) -> Lane | None:
        """Return one more lane, or None if there are STREAMS already or memory has run out.

        Raises OutOfMemory if there is no memory even for the first.
        """
        with self._lock:
            if len(self._lanes) >= self._most:
                return None
            try:
                lane = Lane(self._stream())
            except OutOfMemory:
                if not self._lanes:
                    raise
                self._most = len(self._lanes)
                return None
            self._lanes.append(lane)
            return lane

    def __exit__(self, *exception: object) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes.clear()
        self._free = LifoQueue()
