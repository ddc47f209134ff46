"""All calls that touch the GPU: an engine on one CUDA stream, through cuda-core, with as little logic as possible.

This module has not run on a GPU yet. Tests check the order of the calls, the release of memory and the errors with a
stand-in, which records calls and compares each with the signature in cuda-core.
"""

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, OutOfMemory, explained, one_line
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.tensorrt.library import LIBRARIES, failure, listener, load, without_collection

NO_GPU = "use a machine with an NVIDIA GPU and its driver, or --backend onnxruntime-cpu"


def gpu(extra: str) -> tuple[str, str]:
    """Return name and compute capability of the GPU to use.

    Raises InputError if there is none, or if `extra` is not installed.
    """
    device = use_device(need("cuda.core", extra))
    return device.name, ".".join(map(str, device.compute_capability))


def use_device(core: ModuleType) -> Any:
    """Select the first GPU that CUDA_VISIBLE_DEVICES allows for this thread's CUDA calls, and return it.

    Raises InputError if there is none.
    """
    try:
        device = core.Device(0)
        device.set_current()
    except Exception as error:  # cuda-core's errors share no public base class
        raise InputError(f"no GPU can be used here ({one_line(error)[:200]}); {NO_GPU}") from error
    return device


def cuda_error(error: Exception) -> InputError:
    if "OUT_OF_MEMORY" in str(error):
        return OutOfMemory("the GPU's memory is full; free some or build the engine with a smaller MAX of --batch")
    return InputError(f"CUDA answers {one_line(error)[:200]}; see `mpdsgr doctor`")


class Engine:
    """A deserialised engine with its inputs, its output, and the library it belongs to.

    plan: its serialised form. advice: what the user can do, for error messages. shapes: those of inputs and output by
    name, without the batch. Raises InputError for a plan that is damaged, of another version, or refused by this GPU,
    and without a GPU.
    """

    @without_collection()
    def __init__(self, backend: str, plan: bytes, advice: str) -> None:
        self.trt, self.backend = load(backend), backend
        self.logger = listener(self.trt)
        self.core = need("cuda.core", LIBRARIES[backend].extra)
        self._runtime = self.trt.Runtime(self.logger)
        refuse_invalid(self.trt, self._runtime, plan, advice)
        use_device(self.core)
        self.cuda_engine = self._runtime.deserialize_cuda_engine(plan)
        if self.cuda_engine is None:
            raise failure(self.logger, f"{backend} cannot load the engine", advice)
        names = [self.cuda_engine.get_tensor_name(i) for i in range(self.cuda_engine.num_io_tensors)]
        self.shapes = {name: tuple(self.cuda_engine.get_tensor_shape(name))[1:] for name in names}
        is_input = {name: self.cuda_engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        (self.output,) = [name for name in names if not is_input[name]]
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context_settings: Any = strategy
        if hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy"):  # only TensorRT-RTX has this
            # by default, kernels would be replaced inside a captured graph once better ones are compiled
            self._context_settings = self.cuda_engine.create_runtime_config()
            self._context_settings.set_execution_context_allocation_strategy(strategy)
            kinds = self.trt.DynamicShapesKernelSpecializationStrategy
            self._context_settings.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER

    def context(self) -> Any:
        """Return a new execution context without memory of its own. Raises InputError or OutOfMemory if that fails."""
        context = self.cuda_engine.create_execution_context(self._context_settings)
        if context is None:
            raise failure(self.logger, f"{self.backend} cannot run the engine", "use a smaller --batch")
        return context


def refuse_invalid(trt: ModuleType, loader: Any, plan: bytes, advice: str) -> None:
    """Raise InputError if the plan's header is damaged or of another version, which only TensorRT-RTX can tell.

    Its other diagnostics are logged as warnings, because it also calls plans invalid that run on this GPU.
    """
    if not hasattr(loader, "get_engine_validity"):
        return
    _, bits = loader.get_engine_validity(plan)
    kinds = trt.EngineInvalidityDiagnostics
    for kind, defect in ((kinds.MALFORMED_ENGINE, "is damaged"), (kinds.VERSION_MISMATCH, "is of another version")):
        if bits & kind.value:
            raise InputError(f"the engine {defect} (TensorRT-RTX {trt.__version__} says {kind.name}); {advice}")
    if bits:
        names = ", ".join(name for name, kind in kinds.__members__.items() if bits & kind.value)
        log.warning("TensorRT-RTX does not guarantee that this engine works on this machine: %s", names)


class CudaStream:
    """An engine on its own CUDA stream, with buffers for `largest` images, for one thread at a time.

    inputs, output: float32 [largest, ...] in pinned host memory; executions read the inputs and write the output.
    """

    def __init__(self, engine: Engine, largest: int) -> None:
        self.engine = engine
        with explained(cuda_error), ExitStack() as release:
            device = use_device(engine.core)
            self.stream = device.create_stream()
            release.callback(self.stream.close)
            self.scratch_bytes = max(1, engine.cuda_engine.device_memory_size_v2)
            self.scratch = release.enter_context(device.allocate(self.scratch_bytes, stream=self.stream))
            pinned, host = engine.core.LegacyPinnedMemoryResource(), {}
            self.pairs: dict[str, tuple[Any, Any]] = {}  # buffers on host and device
            for name, shape in engine.shapes.items():
                count = largest * prod(shape)
                on_host = release.enter_context(pinned.allocate(4 * count))
                on_device = release.enter_context(device.allocate(4 * count, stream=self.stream))
                self.pairs[name] = on_host, on_device
                floats = (ctypes.c_float * count).from_address(int(on_host.handle))
                host[name] = np.ctypeslib.as_array(floats).reshape(largest, *shape)
            self.output: NDArray[np.float32] = host.pop(engine.output)
            self.inputs: dict[str, NDArray[np.float32]] = host
            self._release = release.pop_all()

    def execution(self, batch: int) -> "CudaExecution":
        return CudaExecution(self, batch)

    def close(self) -> None:
        """Free the stream and its memory. Close its executions first."""
        self._release.close()


class CudaExecution:
    """The execution of one batch size on a stream: an execution context and, once captured, its CUDA graph.

    Each batch size has its own context, because a graph is bound to the state of the context it was captured from. All
    share the stream's memory for activations, because a stream runs one execution at a time. Raises InputError for a
    batch that the engine does not take.
    """

    def __init__(self, stream: CudaStream, batch: int) -> None:
        self._stream, self._batch, self._graph = stream, batch, None
        engine = stream.engine
        self._context = engine.context()
        self._context.set_device_memory(int(stream.scratch.handle), stream.scratch_bytes)
        address = self._context.set_tensor_address
        accepted = [address(name, int(on_device.handle)) for name, (_, on_device) in stream.pairs.items()]
        accepted += [self._context.set_input_shape(name, (batch, *engine.shapes[name])) for name in engine.inputs]
        if not all(accepted):
            raise failure(engine.logger, f"the engine does not take a batch of {batch}", "build it again")
        part = engine.core.Buffer.from_handle  # the first rows of a buffer
        self._parts = {
            name: [part(int(buffer.handle), 4 * batch * prod(engine.shapes[name])) for buffer in pair]
            for name, pair in stream.pairs.items()
        }

    def run(self) -> None:
        """Copy the inputs to the device, compute, copy the output back, and wait for it.

        Raises InputError or OutOfMemory if a CUDA call or the engine fails.
        """
        stream = self._stream.stream
        with explained(cuda_error):
            use_device(self._stream.engine.core)
            if self._graph is None:
                self._enqueue(stream, stream)
            else:
                self._graph.launch(stream)
            stream.sync()

    def capture(self) -> None:
        """Capture a CUDA graph that `run` uses from now on, or log a warning if that fails. Call `run` once before."""
        stream = self._stream.stream
        capturable: Callable[[int], bool] = getattr(self._context, "is_stream_capturable", lambda stream: True)
        try:
            with explained(cuda_error), ExitStack() as release:
                if not capturable(int(stream.handle)):
                    raise InputError("the engine cannot be captured")
                builder = stream.create_graph_builder()
                release.callback(builder.close)
                builder.begin_building("thread_local")
                try:
                    self._enqueue(builder, builder.stream)
                finally:
                    builder.end_building()
                self._graph = builder.complete()
        except InputError as error:
            log.warning("batch %d runs without a CUDA graph: %s", self._batch, error)

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._graph = self._context = None

    def _enqueue(self, target: Any, stream: Any) -> None:
        """Queue the copies and the computation. target: the stream, or the builder that captures it."""
        engine = self._stream.engine
        for name in engine.inputs:
            on_host, on_device = self._parts[name]
            on_host.copy_to(on_device, stream=target)
        if not self._context.execute_async_v3(int(stream.handle)):
            raise failure(engine.logger, "the engine fails", "use a smaller batch or build it again")
        on_host, on_device = self._parts[engine.output]
        on_device.copy_to(on_host, stream=target)
