"""Firing rates as an output of the exported network, against torch's own traces and the recorded spikes."""

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import resealed
from onnx import TensorProto, helper
from test_export import NAMES, exported

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.diagnostics.trace import Recorder
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.exporting.precision import PRECISIONS, convert, plan
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.onnx_files import layer_of
from mpdsgr_deploy.runtime import OnnxRuntime, open_predictor
from mpdsgr_deploy.runtime.firing import FiringRates, spike_names, with_firing_rates
from mpdsgr_deploy.snn import Trace


def images(shape: tuple[int, ...], count: int = 7) -> np.ndarray:
    return np.random.default_rng(0).random((count, *shape), np.float32)


def observed(model: SpikingNet, x: np.ndarray, noise: Iterable[np.ndarray] = ()) -> dict[str, np.ndarray]:
    """Each layer's rate [B] in torch, in float64."""
    rates: dict[str, np.ndarray] = {}

    def observe(trace: Trace) -> None:
        spikes = np.stack([state.spikes.numpy() for state in trace.states]).astype(np.float64)
        rates[trace.layer] = spikes.mean((0, *range(2, spikes.ndim)))

    with torch.no_grad():
        model(torch.from_numpy(x), observe, [torch.from_numpy(draw) for draw in noise])
    return rates


def recorded(network: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    """Each layer's rate [B] from spikes that onnxruntime hands out one by one."""
    steps: dict[str, list[np.ndarray]] = {}
    for step, spikes in Recorder(network)(x).spikes.items():
        steps.setdefault(layer_of(step), []).append(spikes.reshape(len(x), -1).mean(1, dtype=np.float64))
    return {layer: np.mean(rates, 0) for layer, rates in steps.items()}


def assert_same(rates: np.ndarray, expected: dict[str, np.ndarray]) -> None:
    assert rates.dtype == np.float32
    assert rates.shape == (len(next(iter(expected.values()))), len(expected))
    wanted = np.stack(list(expected.values()), 1)
    assert wanted.std() > 0.01  # not all alike: an order that is wrong shows
    close = np.abs(rates - wanted) < 1e-6
    assert close.mean() > 0.95  # float32 adds up otherwise elsewhere, and may flip a spike
    np.testing.assert_allclose(rates, wanted, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_rates_of_every_model_are_those_torch_observes(name: str) -> None:
    model, graph, shape = exported(name)
    network = ir.to_proto(graph)
    x = images(shape)
    expected = observed(model, x)
    steps = spike_names(network, "it")
    assert list(steps) == [layer.name for layer in model.layers()] == list(expected)
    assert {len(names) for names in steps.values()} == {model.T}
    shown = with_firing_rates(network, steps)
    onnx.checker.check_model(shown, full_check=True)
    with OnnxRuntime(shown) as artefact:
        logits, rates = artefact.answers(x)
        assert_same(rates, expected)
        assert np.array_equal(artefact(x), logits)
    with OnnxRuntime(network, source="the same without rates") as plain:
        np.testing.assert_allclose(plain(x), logits, atol=1e-5)


@pytest.mark.parametrize("neurons", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_precision_keeps_the_names_and_says_its_own_rates(name: str, neurons: str) -> None:
    _, graph, shape = exported(name)
    x = images(shape)
    plain = list(spike_names(ir.to_proto(graph), "it").items())
    for precision in PRECISIONS:
        network = ir.to_proto(convert(graph, plan(graph, precision), neurons))
        assert list(spike_names(network, "it").items()) == plain
        shown = with_firing_rates(network, dict(plain))
        onnx.checker.check_model(shown, full_check=True)
        with OnnxRuntime(shown) as artefact:
            assert_same(artefact.answers(x)[1], recorded(network, x))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bundle_answers_as_its_plain_predictor_and_shows_its_rates(precise: Bundle, precision: str) -> None:
    x = load_test(precise.manifest.recipe.data)[:33].unit()
    file = precise.variant(precision)
    with open_predictor(precise, precision=precision) as plain, FiringRates(precise, precision=precision) as network:
        logits, rates = network(x)
        np.testing.assert_allclose(logits, plain(x), atol=1e-5)
        assert network.layers == tuple(spike_names(onnx.load(file), file)) == ("conv1", "conv2", "conv3")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(network, np.split(x, 11)))
    assert_same(rates, recorded(onnx.load(file), x))
    assert_same(np.concatenate([part for _, part in answers]), recorded(onnx.load(file), x))


@pytest.mark.parametrize("backend", ["openvino", "torch", "onnxruntime-tensorrt", "abacus"])
def test_a_backend_that_shows_no_spikes(bundle: Bundle, backend: str) -> None:
    with pytest.raises(InputError, match=f"backend {backend} .*choose one of: onnxruntime-cpu, onnxruntime-cuda"):
        FiringRates(bundle, backend)


def test_a_file_without_names_of_spikes() -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["logits"])],
        "linear",
        [value("images", TensorProto.FLOAT, ["batch", 1, 2, 2])],
        [value("logits", TensorProto.FLOAT, ["batch", 4])],
    )
    with pytest.raises(InputError, match=r"model\.onnx does not name its spikes.*; export the network again"):
        spike_names(helper.make_model(graph), "model.onnx")


def test_a_network_that_breaks_its_promise_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "swapped")
    inputs, logits = bundle.golden()
    np.savez(tmp_path / "swapped" / "golden.npz", inputs=inputs, fp32=np.roll(logits, 1, axis=1))
    with pytest.raises(EvaluationError, match="onnxruntime-cpu answers the bundle's golden batch wrongly"):
        FiringRates(open_bundle(resealed(tmp_path / "swapped")))
