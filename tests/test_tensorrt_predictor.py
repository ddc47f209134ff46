"""The predictor on an engine, with onnxruntime in place of the GPU: cutting, padding, graphs by size, threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError, OutOfMemory
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.tensorrt import TensorRT, predictor


class HostStream:
    """Buffers in host memory, and onnxruntime as the engine; notes what is asked of it."""

    def __init__(self, model: Path, largest: int, notes: list[Any]) -> None:
        self.session = onnxruntime.InferenceSession(str(model))
        self.inputs = {
            spec.name: np.full((largest, *spec.shape[1:]), 0.5, np.float32) for spec in self.session.get_inputs()
        }
        self.output = np.full((largest, self.session.get_outputs()[0].shape[1]), np.nan, np.float32)
        self.notes = notes

    def execution(self, batch: int) -> "HostExecution":
        self.notes.append(("new", batch))
        return HostExecution(self, batch)

    def close(self) -> None:
        self.notes.append(("close stream",))


class HostExecution:
    def __init__(self, stream: HostStream, batch: int) -> None:
        self.stream, self.batch = stream, batch

    def run(self) -> None:
        feeds = {name: rows[: self.batch] for name, rows in self.stream.inputs.items()}
        self.stream.notes.append(("run", self.batch, float(feeds["images"][-1].sum())))
        self.stream.output[: self.batch] = self.stream.session.run(None, feeds)[0]

    def capture(self) -> None:
        self.stream.notes.append(("capture", self.batch))

    def close(self) -> None:
        self.stream.notes.append(("close", self.batch))


class Rig:
    """A predictor of the bundle on host streams, and what they were asked."""

    def __init__(self, bundle: Bundle, batch: tuple[int, int, int], **options: Any) -> None:
        self.notes: list[Any] = []
        self.predictor = TensorRT(
            lambda: HostStream(bundle.variant("fp32"), batch[2], self.notes),
            batch,
            bundle.manifest.input_shape,
            bundle.manifest.input_name,
            **options,
        )

    def asked(self, what: str) -> list[int]:
        return [note[1] for note in self.notes if note[0] == what]


@pytest.fixture(scope="module")
def images(bundle: Bundle) -> np.ndarray:
    return load_test(bundle.manifest.recipe.data)[:40].unit()


@pytest.fixture(scope="module")
def expected(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    with OnnxRuntime(bundle.variant("fp32")) as session:
        return session(images)


@pytest.mark.parametrize(
    ("batch", "n", "sizes"),
    [
        ((1, 8, 16), 5, [5]),
        ((1, 8, 16), 16, [16]),
        ((1, 8, 16), 40, [16, 16, 8]),
        ((4, 8, 16), 3, [4]),  # padded
        ((4, 8, 16), 34, [16, 16, 4]),  # cut, and the rest padded
        ((8, 8, 8), 1, [8]),
    ],
)
def test_batches_are_cut_and_padded(
    batch: tuple[int, int, int], n: int, sizes: list[int], bundle: Bundle, images: np.ndarray, expected: np.ndarray
) -> None:
    rig = Rig(bundle, batch)
    with rig.predictor as predict:
        np.testing.assert_allclose(predict(images[:n]), expected[:n], atol=1e-5)
    assert rig.asked("run") == sizes
    if n % batch[2] and n % batch[2] < batch[0]:
        last = [note for note in rig.notes if note[0] == "run"][-1]
        assert last[2] == 0  # the rows added hold zeros, not what was there before


def test_a_size_is_warmed_up_captured_and_then_replayed(bundle: Bundle, images: np.ndarray) -> None:
    rig = Rig(bundle, (1, 8, 16))
    with rig.predictor as predict:
        for n in (3, 3, 5, 3, 5, 5):
            predict(images[:n])
    told = [note[:2] for note in rig.notes if note[0] in ("new", "run", "capture")]
    assert told == [
        *[("new", 3), ("run", 3), ("capture", 3), ("run", 3), ("new", 5), ("run", 5)],
        *[("run", 3), ("capture", 5), ("run", 5), ("run", 5)],
    ]
    assert rig.notes[-1] == ("close stream",)
    assert sorted(rig.asked("close")) == [3, 5]


def test_the_size_used_least_recently_is_dropped(
    bundle: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "SIZES", 2)
    rig = Rig(bundle, (1, 8, 16))
    with rig.predictor as predict:
        for n in (1, 1, 2, 1, 3, 2, 2):
            predict(images[:n])
        assert rig.asked("close") == [2, 1]
        assert rig.asked("new") == [1, 2, 3, 2]
        assert rig.asked("capture") == [1, 2]


def test_outputs_are_fresh_and_inputs_untouched(bundle: Bundle, images: np.ndarray, expected: np.ndarray) -> None:
    x = images[:8].copy()
    with Rig(bundle, (1, 8, 16)).predictor as predict:
        first = predict(x)
        predict(images[8:16])
        np.testing.assert_allclose(first, expected[:8], atol=1e-5)
        first[:] = 0
        np.testing.assert_allclose(predict(x), expected[:8], atol=1e-5)
    assert np.array_equal(x, images[:8])


def test_threads_have_streams_of_their_own_up_to_a_limit(
    bundle: Bundle, images: np.ndarray, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "STREAMS", 3)
    rig, meeting = Rig(bundle, (1, 2, 4)), threading.Barrier(3, timeout=60)
    made, real = [], HostExecution.run

    def run(self: HostExecution) -> None:
        if self.stream not in made:
            made.append(self.stream)
            meeting.wait()  # passes only if three streams run at the same time
        real(self)

    monkeypatch.setattr(HostExecution, "run", run)
    parts = [images[i : i + 1 + i % 4] for i in range(36)]
    with rig.predictor as predict, ThreadPoolExecutor(8) as pool:
        for i, logits in enumerate(pool.map(predict, parts)):
            np.testing.assert_allclose(logits, expected[i : i + 1 + i % 4], atol=1e-5)
    assert len(made) == 3
    assert rig.notes.count(("close stream",)) == 3


def test_full_memory_shares_the_streams_there_are(bundle: Bundle, images: np.ndarray, expected: np.ndarray) -> None:
    """The second stream finds no memory: threads take turns on the first. No first one is an error."""
    rig = Rig(bundle, (1, 2, 4))
    real: Callable[[], Any] = rig.predictor._stream

    def one() -> Any:
        if rig.notes:
            raise OutOfMemory("full")
        rig.notes.append(("made", 0))
        return real()

    rig.predictor._stream = one
    with rig.predictor as predict, ThreadPoolExecutor(4) as pool:
        for logits in pool.map(predict, [images[:4]] * 12):
            np.testing.assert_allclose(logits, expected[:4], atol=1e-5)
    rig.predictor._stream = one
    with pytest.raises(OutOfMemory, match="full"):
        rig.predictor(images[:1])


def test_a_batch_that_fails_gives_its_stream_back(
    bundle: Bundle, images: np.ndarray, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "STREAMS", 1)
    real = HostExecution.run

    def fail(self: HostExecution) -> None:
        raise OutOfMemory("full")

    with Rig(bundle, (1, 2, 4)).predictor as predict:
        monkeypatch.setattr(HostExecution, "run", fail)
        with pytest.raises(OutOfMemory):
            predict(images[:2])
        monkeypatch.setattr(HostExecution, "run", real)
        np.testing.assert_allclose(predict(images[:2]), expected[:2], atol=1e-5)


def test_noise_is_cut_with_its_images(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 3, 1, 1]) for n in ("images", "noise")]
    nodes = [helper.make_node("Sub", ["images", "noise"], ["d"]), helper.make_node("Flatten", ["d"], ["y"])]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])
    graph = helper.make_graph(nodes, "g", tensors, [y])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    x = np.random.default_rng(0).random((7, 3, 1, 1), np.float32)
    with TensorRT(
        lambda: HostStream(tmp_path / "m.onnx", 3, []), (2, 2, 3), (3, 1, 1), "images", lambda x: {"noise": x / 4}
    ) as predict:
        np.testing.assert_array_equal(predict(x), (x - x / 4).reshape(7, 3))


def test_bad_images_are_refused(bundle: Bundle, images: np.ndarray) -> None:
    with Rig(bundle, (1, 2, 4)).predictor as predict:
        for bad in (images.astype(np.float64), images[:0], images * 2, images[0], np.where(images > 0, np.nan, images)):
            with pytest.raises(InputError):
                predict(bad)
