"""All calls that touch the GPU: an engine on one CUDA stream, through cuda-bindings, with as little logic as possible.

Not yet run on a GPU. Without one, tests check that every CUDA call below exists and takes as many arguments.
"""

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, OutOfMemory
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.tensorrt.library import LIBRARIES, failure, listener, load, without_collection

NO_GPU = "use a machine with an NVIDIA GPU and its driver, or --backend onnxruntime-cpu"


class GPU(NamedTuple):
    """The first GPU that CUDA_VISIBLE_DEVICES leaves."""

    name: str
    compute_capability: str


def runtime(extra: str) -> ModuleType:
    """The CUDA runtime's bindings. Raises InputError naming the extra."""
    return need("cuda.bindings.runtime", extra)


def check(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call behind its error code. Raises OutOfMemory or InputError for an error."""
    error, *values = result
    if error.name == "cudaErrorMemoryAllocation":
        raise OutOfMemory("the GPU's memory is full; free some or build the engine with a smaller MAX of --batch")
    if error.value:
        raise InputError(f"CUDA answers {error.name}; see `mpdsgr doctor`")
    return values[0] if values else None


def gpu(extra: str) -> GPU:
    """The GPU used here. Raises InputError if there is none."""
    cudart = runtime(extra)
    error, properties = cudart.cudaGetDeviceProperties(0)
    if error.value:
        raise InputError(f"no GPU can be used here ({error.name}); {NO_GPU}")
    return GPU(properties.name.decode().strip("\0"), f"{properties.major}.{properties.minor}")


class Engine:
    """A deserialised engine with its inputs, its output, and the library it belongs to.

    Raises InputError for a plan that is damaged, of another version, or refused by this GPU.
    """

    @without_collection()
    def __init__(self, backend: str, plan: bytes, advice: str) -> None:
        self.trt, self.backend = load(backend), backend
        self.heard = listener(self.trt)
        self.cudart = runtime(LIBRARIES[backend].extra)
        self._runtime = self.trt.Runtime(self.heard)
        refuse_invalid(self.trt, self._runtime, plan, advice)
        gpu(LIBRARIES[backend].extra)
        self.cuda_engine = self._runtime.deserialize_cuda_engine(plan)
        if self.cuda_engine is None:
            raise failure(self.heard, f"{backend} cannot load the engine", advice)
        names = [self.cuda_engine.get_tensor_name(i) for i in range(self.cuda_engine.num_io_tensors)]
        self.shapes = {name: tuple(self.cuda_engine.get_tensor_shape(name))[1:] for name in names}  # without the batch
        is_input = {name: self.cuda_engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        (self.output,) = [name for name in names if not is_input[name]]
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context_settings: Any = strategy
        if hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy"):  # TensorRT-RTX
            # by default, kernels are replaced inside a captured graph once better ones are compiled
            self._context_settings = self.cuda_engine.create_runtime_config()
            self._context_settings.set_execution_context_allocation_strategy(strategy)
            kinds = self.trt.DynamicShapesKernelSpecializationStrategy
            self._context_settings.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER

    def context(self) -> Any:
        """A new execution context without memory of its own."""
        context = self.cuda_engine.create_execution_context(self._context_settings)
        if context is None:
            raise failure(self.heard, f"{self.backend} cannot run the engine", "use a smaller --batch")
        return context


def refuse_invalid(trt: ModuleType, loader: Any, plan: bytes, advice: str) -> None:
    """Raise InputError if the plan's header is damaged or of another version. TensorRT-RTX alone can tell.

    It calls plans invalid on GPUs that it is not made for and yet runs on, so its other diagnostics are warnings only.
    """
    if not hasattr(loader, "get_engine_validity"):
        return
    _, bits = loader.get_engine_validity(plan)
    kinds = trt.EngineInvalidityDiagnostics
    for kind, what in ((kinds.MALFORMED_ENGINE, "is damaged"), (kinds.VERSION_MISMATCH, "is of another version")):
        if bits & kind.value:
            raise InputError(f"the engine {what} (TensorRT-RTX {trt.__version__} says {kind.name}); {advice}")
    if bits:
        names = ", ".join(name for name, kind in kinds.__members__.items() if bits & kind.value)
        log.warning("TensorRT-RTX does not promise that this engine works here: %s", names)


class CudaStream:
    """An engine on a stream of its own, with buffers for the largest batch. For one thread at a time.

    inputs, output: pinned host memory [largest, ...], read and written by the executions.
    """

    def __init__(self, engine: Engine, largest: int) -> None:
        self.engine, self.cudart = engine, engine.cudart
        self._release = ExitStack()
        try:
            self.handle = check(self.cudart.cudaStreamCreateWithFlags(self.cudart.cudaStreamNonBlocking))
            self._release.callback(self.cudart.cudaStreamDestroy, self.handle)
            self.scratch_bytes = max(1, engine.cuda_engine.device_memory_size_v2)
            self.scratch = self._device(self.scratch_bytes)
            self.inputs = {name: self._host((largest, *engine.shapes[name])) for name in engine.inputs}
            self.output = self._host((largest, *engine.shapes[engine.output]))
            self.device = {name: self._device(self.host(name).nbytes) for name in engine.shapes}
        except BaseException:
            self._release.close()
            raise

    def host(self, name: str) -> NDArray[np.float32]:
        """The pinned memory of the input or output called `name`."""
        return self.output if name == self.engine.output else self.inputs[name]

    def execution(self, batch: int) -> "CudaExecution":
        return CudaExecution(self, batch)

    def close(self) -> None:
        """Free stream and memory; executions must have been closed."""
        self._release.close()

    def _device(self, size: int) -> int:
        pointer: int = check(self.cudart.cudaMalloc(size))
        self._release.callback(self.cudart.cudaFree, pointer)
        return pointer

    def _host(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        count = prod(shape)
        pointer: int = check(self.cudart.cudaMallocHost(4 * count))
        self._release.callback(self.cudart.cudaFreeHost, pointer)
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(pointer)).reshape(shape)


class CudaExecution:
    """One batch size on a stream: an execution context and, once captured, its CUDA graph.

    Each has its own context, since a graph is bound to the state of the context it was captured from; activations share
    the stream's memory, since a stream runs one at a time.
    """

    def __init__(self, stream: CudaStream, batch: int) -> None:
        self._stream, self._batch, self._graph = stream, batch, None
        engine = stream.engine
        self._context = engine.context()
        self._context.set_device_memory(stream.scratch, stream.scratch_bytes)
        accepted = [self._context.set_tensor_address(name, address) for name, address in stream.device.items()]
        accepted += [self._context.set_input_shape(name, (batch, *engine.shapes[name])) for name in engine.inputs]
        if not all(accepted):
            raise failure(engine.heard, f"the engine does not take a batch of {batch}", "build it again")

    def run(self) -> None:
        """Copy the inputs to the device, compute, copy the output back, wait."""
        cudart, stream = self._stream.cudart, self._stream.handle
        if self._graph is None:
            self._enqueue()
        else:
            check(cudart.cudaGraphLaunch(self._graph, stream))
        check(cudart.cudaStreamSynchronize(stream))

    def capture(self) -> None:
        """Run as one CUDA graph from now on; log a warning if that is impossible. One ordinary run must come before."""
        cudart, stream = self._stream.cudart, self._stream.handle
        capturable: Callable[[int], bool] = getattr(self._context, "is_stream_capturable", lambda stream: True)
        try:
            if not capturable(int(stream)):
                raise InputError("the engine cannot be captured")
            check(cudart.cudaStreamBeginCapture(stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
            try:
                self._enqueue()
            finally:
                result = cudart.cudaStreamEndCapture(stream)
            graph = check(result)
            try:
                self._graph = check(cudart.cudaGraphInstantiate(graph, 0))
            finally:
                cudart.cudaGraphDestroy(graph)
        except InputError as error:
            cudart.cudaGetLastError()  # or the next call would report it
            log.warning("batch %d runs without a CUDA graph: %s", self._batch, error)

    def close(self) -> None:
        if self._graph is not None:
            self._stream.cudart.cudaGraphExecDestroy(self._graph)
        self._graph = self._context = None

    def _enqueue(self) -> None:
        stream, cudart, batch = self._stream, self._stream.cudart, self._batch
        kinds = cudart.cudaMemcpyKind
        for name in stream.engine.inputs:
            rows = stream.host(name)[:batch]
            to_device = kinds.cudaMemcpyHostToDevice
            check(cudart.cudaMemcpyAsync(stream.device[name], rows.ctypes.data, rows.nbytes, to_device, stream.handle))
        if not self._context.execute_async_v3(int(stream.handle)):
            raise failure(stream.engine.heard, "the engine fails", "use a smaller batch or build it again")
        name, rows = stream.engine.output, stream.output[:batch]
        to_host = kinds.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpyAsync(rows.ctypes.data, stream.device[name], rows.nbytes, to_host, stream.handle))
