"""mpdsgr predict where memory runs short: batches are halved, and what cannot be done is one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from predicting import answering, folder, job, logits

from mpdsgr_deploy.bundle import Bundle, NoiseInput
from mpdsgr_deploy.errors import InputError, OutOfMemory
from mpdsgr_deploy.prediction import workers
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime, open_predictor
from mpdsgr_deploy.runtime.openvino import OpenVino
from mpdsgr_deploy.runtime.torch_model import TorchModel


def test_a_batch_too_large_for_memory_is_halved_and_said_once(
    bundle: Bundle, folder: Path, logits: np.ndarray, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    sizes = []
    with open_predictor(bundle) as predictor:

        def small(x: np.ndarray) -> np.ndarray:
            sizes.append(len(x))
            if len(x) > 5:
                raise OutOfMemory("too much")
            return predictor(x)

        answering(small, monkeypatch)
        job(bundle, folder, batch=32).to_file(tmp_path / "out.npz")
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], logits, atol=1e-5)
    assert sizes == [32, 16, 8, *[4] * 15]
    assert [r.message for r in caplog.records if "memory" in r.message] == [
        "out of memory; continuing with batches of 4"
    ]


def write_network(path: Path, nodes: list[onnx.NodeProto], **inputs: tuple[object, ...]) -> Path:
    """An ONNX file of float32 `inputs` and the output y."""
    make = onnx.helper
    values = {**inputs, "y": ("b", 1, 1, 1)}
    *given, y = (make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in values.items())
    graph = make.make_graph(nodes, "network", given, [y])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10), path)
    return path


def reshaped(path: Path, *shape: int) -> Path:
    """Every image filled up to a shape, by Expand; then its maximum."""
    make = onnx.helper
    constant = make.make_node("Constant", [], ["s"], value_ints=shape)
    nodes = [constant, make.make_node("Expand", ["x", "s"], ["e"]), make.make_node("ReduceMax", ["e"], ["y"])]
    return write_network(path, nodes, x=("b", 1, 1, 1))


def test_a_single_image_too_large_for_memory_is_one_line(tmp_path: Path) -> None:
    """A real session that asks for 4 PB an image, in the place of the network."""
    with OnnxRuntime(reshaped(tmp_path / "greedy.onnx", 1, 1, 1, 10**15)) as session:
        with pytest.raises(OutOfMemory, match="batch of 3"):
            session(np.zeros((3, 1, 1, 1), np.float32))
        with pytest.raises(OutOfMemory, match="single image") as error:
            workers.Halving(session, 8)(np.zeros((8, 1, 1, 1), np.uint8))
    assert "\n" not in str(error.value)


def test_noise_too_large_for_memory_is_one_line(tmp_path: Path) -> None:
    """numpy's own MemoryError, of 4 PB of noise an image."""
    nodes = [onnx.helper.make_node("ReduceMax", ["noise"], ["m"]), onnx.helper.make_node("Add", ["x", "m"], ["y"])]
    path = write_network(tmp_path / "noisy.onnx", nodes, x=("b", 1, 1, 1), noise=("b", 10**15))
    noise = NoiseSource([NoiseInput(name="noise", kind="uniform", shape=(10**15,))])
    for backend in (OnnxRuntime, OpenVino):
        with backend(path, noise=noise) as session, pytest.raises(OutOfMemory, match="single image"):
            workers.Halving(session, 8)(np.zeros((8, 1, 1, 1), np.uint8))


@pytest.mark.parametrize("backend", [OnnxRuntime, OpenVino])
def test_what_fails_while_it_runs_is_one_line(backend: Callable[[Path], Predictor], tmp_path: Path) -> None:
    """Four images do not fill up to two."""
    path, x = reshaped(tmp_path / "two.onnx", 2, 1, 1, 1), np.zeros((4, 1, 1, 1), np.float32)
    with backend(path) as session, pytest.raises(InputError, match=r"(fails on a|in) batch(es)? of 4") as error:
        session(x)
    assert not isinstance(error.value, OutOfMemory)
    assert "\n" not in str(error.value)


def test_torch_says_that_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(torch.nn.Module):
        stochastic = False

        def forward(self, x: torch.Tensor, observe: object, noise: object) -> torch.Tensor:
            return torch.empty(10**15)

    model = TorchModel(Greedy(), (1, 1, 1))
    x = np.zeros((3, 1, 1, 1), np.float32)
    with pytest.raises(OutOfMemory, match="batch of 3"):
        model(x)

    def on_the_gpu(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Greedy, "forward", on_the_gpu)
    with pytest.raises(OutOfMemory, match="batch of 3"):
        model(x)
    monkeypatch.setattr(Greedy, "to", on_the_gpu)
    with pytest.raises(OutOfMemory, match="the network"):
        TorchModel(Greedy(), (1, 1, 1))
