"""The calls to CUDA against a stand-in for cuda-core: host memory, and calls held against the real signatures."""

import ctypes
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpdsgr_deploy.errors import InputError, OutOfMemory
from mpdsgr_deploy.runtime.tensorrt import TensorRT, cuda

real = pytest.importorskip("cuda.core")
SHAPES = {"images": (1, 2, 2), "y": (4,)}


class GPU:
    """What cuda.core offers, on the host. calls: names in order; fail: the error that a call of this name raises."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.alive: list[object] = []
        self.recording: list[Callable[[], object]] | None = None
        self.core = SimpleNamespace(
            Device=lambda number: Device(self),
            LegacyPinnedMemoryResource=lambda: Pinned(self),
            Buffer=SimpleNamespace(from_handle=lambda *address: Buffer(self, *address)),
        )

    def note(self, kind: type, name: str, *arguments: Any, **named: Any) -> None:
        """Record a call, which must fit the signature of cuda-core's class, and fail if it is to."""
        inspect.signature(getattr(kind, name)).bind(None, *arguments, **named)
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def do(self, work: Callable[[], object]) -> None:
        """Work queued on the stream: done at once, or kept for the graph that is being captured."""
        work() if self.recording is None else self.recording.append(work)


class Device:
    name, compute_capability = "stand-in", (8, 9)

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu

    def set_current(self) -> None:
        self.gpu.note(real.Device, "set_current")

    def create_stream(self) -> "Stream":
        self.gpu.note(real.Device, "create_stream")
        return Stream(self.gpu)

    def allocate(self, size: int, *, stream: "Stream") -> "Buffer":
        self.gpu.note(real.Device, "allocate", size, stream=stream)
        return Buffer(self.gpu, None, size)


class Pinned:
    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu

    def allocate(self, size: int) -> "Buffer":
        self.gpu.note(real.LegacyPinnedMemoryResource, "allocate", size)
        return Buffer(self.gpu, None, size)


class Buffer:
    """Memory of its own, or a view of an address."""

    def __init__(self, gpu: GPU, handle: int | None, size: int) -> None:
        self.gpu, self.size = gpu, size
        self.memory = (ctypes.c_char * size)() if handle is None else (ctypes.c_char * size).from_address(handle)
        self.handle = ctypes.addressof(self.memory)

    def __enter__(self) -> "Buffer":
        self.gpu.alive.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        assert any(isinstance(thing, Stream) for thing in self.gpu.alive), "the stream must outlive its buffers"
        self.gpu.alive.remove(self)

    def copy_to(self, target: "Buffer", *, stream: object) -> None:
        self.gpu.note(real.Buffer, "copy_to", target, stream=stream)
        assert target.size == self.size
        assert isinstance(stream, Stream) == (self.gpu.recording is None)
        self.gpu.do(lambda: ctypes.memmove(target.handle, self.handle, self.size))


class Stream:
    handle = 7

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        gpu.alive.append(self)

    def close(self) -> None:
        self.gpu.note(real.Stream, "close")
        self.gpu.alive.remove(self)

    def sync(self) -> None:
        self.gpu.note(real.Stream, "sync")

    def create_graph_builder(self) -> "Builder":
        self.gpu.note(real.Stream, "create_graph_builder")
        return Builder(self)


class Builder:
    def __init__(self, stream: Stream) -> None:
        self.gpu, self.stream, self.work = stream.gpu, stream, list[Callable[[], object]]()

    def begin_building(self, mode: str) -> None:
        self.gpu.note(real.graph.GraphBuilder, "begin_building", mode)
        self.gpu.recording = self.work

    def end_building(self) -> None:
        self.gpu.note(real.graph.GraphBuilder, "end_building")
        self.gpu.recording = None

    def complete(self) -> "Graph":
        self.gpu.note(real.graph.GraphBuilder, "complete")
        return Graph(self)

    def close(self) -> None:
        self.gpu.note(real.graph.GraphBuilder, "close")


class Graph:
    def __init__(self, builder: Builder) -> None:
        self.gpu, self.work = builder.gpu, builder.work
        self.gpu.alive.append(self)

    def launch(self, stream: Stream) -> None:
        self.gpu.note(real.graph.Graph, "launch", stream)
        for work in self.work:
            work()

    def close(self) -> None:
        self.gpu.note(real.graph.Graph, "close")
        self.gpu.alive.remove(self)


class Context:
    """An execution context whose network doubles the pixels."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu, self.address, self.batch = gpu, dict[str, int](), 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert (address, size) == (self.gpu.alive[1].handle, 64)  # type: ignore[attr-defined]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.address[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert shape[1:] == SHAPES[name]
        self.batch = shape[0]
        return shape[0] < 4

    def execute_async_v3(self, handle: int) -> bool:
        assert handle == Stream.handle
        self.gpu.calls.append("execute")
        floats = {name: (ctypes.c_float * (4 * self.batch)).from_address(at) for name, at in self.address.items()}
        x, y = (np.ctypeslib.as_array(floats[name]) for name in ("images", "y"))
        self.gpu.do(lambda: np.multiply(x, 2, out=y))
        return "execute" not in self.gpu.fail


@pytest.fixture
def gpu() -> GPU:
    return GPU()


@pytest.fixture
def engine(gpu: GPU) -> Any:
    return SimpleNamespace(
        core=gpu.core,
        inputs=["images"],
        output="y",
        shapes=SHAPES,
        cuda_engine=SimpleNamespace(device_memory_size_v2=64),
        context=lambda: Context(gpu),
        logger=SimpleNamespace(errors=["out of order"]),
    )


RUN = ["set_current", "copy_to", "execute", "copy_to", "sync"]
CAPTURE = ["create_graph_builder", "begin_building", *RUN[1:4], "end_building", "complete", "close"]


def test_batches_are_computed_captured_and_replayed_in_order(gpu: GPU, engine: Any) -> None:
    x = np.random.default_rng(0).random((3, 1, 2, 2), np.float32)
    with TensorRT(lambda: cuda.CudaStream(engine, 3), (1, 2, 3), (1, 2, 2), "images") as predict:
        for images in (x[:2], x[1:], x[::2]):
            np.testing.assert_array_equal(predict(images), 2 * images.reshape(len(images), 4))
        made = ["set_current", "create_stream", *["allocate"] * 5]
        assert gpu.calls == [*made, *RUN, *CAPTURE, "set_current", "launch", "sync", "set_current", "launch", "sync"]
        gpu.calls.clear()
    assert gpu.calls == ["close", "close"]  # the graph, and after the buffers the stream
    assert not gpu.alive


@pytest.mark.parametrize("failing", ["create_graph_builder", "begin_building", "copy_to", "complete", "execute"])
def test_a_capture_that_fails_leaves_plain_runs(
    failing: str, gpu: GPU, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stream = cuda.CudaStream(engine, 2)
    execution = stream.execution(2)
    stream.inputs["images"][:] = 3
    execution.run()
    gpu.fail = {failing: RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")}
    execution.capture()
    assert "batch 2 runs without a CUDA graph" in caplog.text
    assert gpu.recording is None
    gpu.fail = {}
    stream.output[:] = 0
    execution.run()
    assert (stream.output == 6).all()
    execution.close()
    stream.close()
    assert not gpu.alive


@pytest.mark.parametrize("number", range(5))
def test_full_memory_frees_what_was_allocated(
    number: int, gpu: GPU, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = gpu.note

    def full(kind: type, name: str, *arguments: Any, **named: Any) -> None:
        if name == "allocate" and gpu.calls.count("allocate") == number:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: no memory is left")
        note(kind, name, *arguments, **named)

    monkeypatch.setattr(gpu, "note", full)
    with pytest.raises(OutOfMemory, match="smaller MAX of --batch"):
        cuda.CudaStream(engine, 2)
    assert not gpu.alive


def test_errors_are_one_line(gpu: GPU, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = cuda.CudaStream(engine, 8)
    with pytest.raises(InputError, match="does not take a batch of 8: out of order"):
        stream.execution(8)
    execution = stream.execution(1)
    gpu.fail = {"sync": RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS:\nbad")}
    with pytest.raises(InputError, match="CUDA answers CUDA_ERROR_ILLEGAL_ADDRESS: bad; see"):
        execution.run()
    gpu.fail = {"execute": RuntimeError()}
    with pytest.raises(InputError, match="the engine fails"):
        execution.run()
    monkeypatch.setitem(sys.modules, "cuda.core", gpu.core)  # type: ignore[arg-type]
    assert cuda.gpu("rtx") == ("stand-in", "8.9")
    gpu.fail = {"set_current": RuntimeError("no\ndriver")}
    with pytest.raises(InputError, match=r"no GPU can be used here \(no driver\); use a machine with"):
        cuda.gpu("rtx")
