"""The attack graph of every kind of network against torch's autograd."""

import copy
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from attack_networks import NETWORKS, SMALL, Run, deviation, images
from conftest import assert_input_error, mpdsgr_here, small_recipe
from onnx import TensorProto
from test_export import NAMES, exported, learned
from torch.nn import functional as F

from mpdsgr_deploy.attack_graph import attack_graph, derived
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.attacks.attacker_surrogate import with_surrogate
from mpdsgr_deploy.attacks.torch_target import cross_entropy, input_gradient
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.exporting.precision import FORMATS, PRECISIONS, convert, plan, products, rounded_weights
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.recipe import SWEEP
from mpdsgr_deploy.runtime import NoiseSource
from mpdsgr_deploy.runtime.session import CPU, Session
from mpdsgr_deploy.runtime.tensorrt import build_engine
from mpdsgr_deploy.runtime.torch_model import noise_inputs
from mpdsgr_deploy.surrogates import AVERAGED, parse_surrogate, trained_surrogate

KINDS = (
    *SWEEP,
    "rectangular:0.5",
    "sigmoid",
    "sigmoid:2",
    "superspike",
    "superspike:3",
    "exponential:1",
    "arctan",
    "arctan+detached",
    "triangle:0.5+averaged",
    "superspike:20+averaged",
    "pdsg",
)


def by_torch(model: SpikingNet, x: np.ndarray, y: np.ndarray, surrogate: str, noise: Any, dtype: Any) -> Gradient:
    """Autograd's answer, in float32 or float64."""
    attacked = with_surrogate(model, surrogate).to(dtype)
    draws = [torch.from_numpy(draw).to(dtype) for draw in noise.values()]
    tensor = torch.from_numpy(x).to(dtype)

    def loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, classes)

    found = input_gradient(lambda x: attacked(x, None, draws), tensor, torch.from_numpy(y), loss)
    return Gradient(*(part.double().numpy() for part in found))


def assert_torch_agrees(model: SpikingNet, run: Run, x: np.ndarray, y: np.ndarray, surrogate: str) -> None:
    """To 1e-5, and to what float32 costs torch itself where a narrow surrogate multiplies the rounding of a potential.

    Compared on images whose logits agree; where a potential is within rounding of the threshold a spike may differ.
    """
    noise = NoiseSource(noise_inputs(model, x.shape[1:]), 3)(x)
    found = run(x, y, **noise)
    expected = by_torch(model, x, y, surrogate, noise, torch.float32)
    alike = np.abs(found["logits"] - expected.logits).max(1) <= 1e-5
    assert alike.sum() >= len(x) - 1
    np.testing.assert_allclose(found["ce"][alike], expected.loss[alike], atol=2e-5)
    error = deviation(found["gradient"], expected.gradient)[alike]
    if error.max() > 1e-5:
        exact = by_torch(model, x, y, surrogate, noise, torch.float64)
        rounding = deviation(expected.gradient, exact.gradient)[alike]
        assert (error <= 1e-5 + 4 * np.median(rounding)).all(), (error, rounding)
    assert np.abs(expected.gradient).max() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_torchs_gradient(name: str) -> None:
    model, graph, shape = NETWORKS[name]()
    thoroughly = name == "vgg-small"  # a surrogate and a batch differ in nodes that all networks have
    of_neurons = () if name in NAMES else ("triangle:0.5+averaged", "pdsg")  # these differ in neurons alone
    surrogates = KINDS if thoroughly else ("triangle:0.25", "rate", *of_neurons)
    x, y = images(33, shape)
    for surrogate in surrogates:
        if (surrogate == "rate" or AVERAGED in surrogate) and name in ("dlif", "rsc and stog"):
            continue  # torch's takes gates and gains for a part of the neuron
        run = Run(ir.to_proto(graph), surrogate)
        batches = (1, 2, 5, 33) if surrogate == "triangle:1" else (33,) if thoroughly else (1, 9)
        for batch in batches:
            assert_torch_agrees(model, run, x[:batch], y[:batch], surrogate)


def test_the_surrogate_of_training_is_named_with_its_width() -> None:
    assert trained_surrogate(small_recipe(neuron={"surrogate_parameter": 0.5})) == "triangle:0.5"
    assert trained_surrogate(small_recipe(neuron={"surrogate": "superspike"})) == "superspike:10"
    assert trained_surrogate(small_recipe(neuron={"detach_reset": True})) == "triangle:1+detached"


def test_a_network_trained_with_detached_resets_has_torchs_gradient() -> None:
    model, graph, shape = exported("vgg-small")
    assert all(layer.neuron.detach_reset for layer in model.layers())
    x, y = images(9, shape)
    pixels = torch.from_numpy(x).requires_grad_()
    loss = F.cross_entropy(model(pixels), torch.from_numpy(y), reduction="sum")
    (expected,) = torch.autograd.grad(loss, pixels)
    found, attached = (Run(ir.to_proto(graph), f"triangle:1{how}")(x, y)["gradient"] for how in ("+detached", ""))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert np.abs(attached - expected.numpy()).max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("triangle:1+dettached", "above 0"),
        ("triangel", "did you mean 'triangle'"),
        ("triangle:0", "above 0"),
        ("sigmoid:x", "KIND:NUM"),
        ("rate:2", "KIND"),
        ("rate+averaged", "KIND"),
        ("triangle:1+detached+averaged", "and without .detached"),
    ],
)
def test_a_wrong_surrogate_is_one_line(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse_surrogate(name)


def test_parts_that_do_not_tile_are_padded() -> None:
    """y = x_0 + x_2 of x [batch, 3], by Slice and Squeeze: the gradient in x_1 is 0."""
    text = """<ir_version: 10, opset_import: ["": 21]> parts (float[batch, 3, 1, 2] images) => (float[batch, 2] logits)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[2] axes = {1, 2}> {
            first = Slice (images, zero, one, one)
            last = Slice (images, two, three, one)
            sum = Add (first, last)
            logits = Squeeze (sum, axes)
        }"""
    x = np.random.default_rng(0).random((4, 3, 1, 2), np.float32)
    gradient = Run(onnx.parser.parse_model(text), "triangle")(x, np.zeros(4, np.int64))["gradient"]
    assert not gradient[:, 1].any()
    assert np.array_equal(gradient[:, 0], gradient[:, 2])
    assert gradient[:, 0].all()


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("name", ["vgg-small", "wrn16-4", "poisson"])
def test_a_quantised_network_is_attacked_through_its_own_weights(name: str, precision: str) -> None:
    """As the float32 graph whose weights are the rounded ones, and unlike the float32 network."""
    _, graph, shape = NETWORKS[name]()
    layers, rounded = plan(graph, precision), graph.clone()
    for layer, node in products(rounded).items():
        if layers[layer] == precision:
            weights = node.inputs[1].const_value.numpy()
            values, scales = rounded_weights(weights, FORMATS[precision], np.dtype(np.float32))
            back = values.astype(np.float32) * scales.reshape(-1, *[1] * (weights.ndim - 1))
            node.inputs[1].const_value = ir.tensor(back, name=node.inputs[1].name)
    x, y = images(33, shape)
    noise = {"uniform_0": np.random.default_rng(3).random((33, 3, *shape), np.float32)} if name == "poisson" else {}
    found, expected, exact = (
        Run(ir.to_proto(network), "triangle")(x, y, **noise) for network in (convert(graph, layers), rounded, graph)
    )
    alike = np.abs(found["logits"] - expected["logits"]).max(1) <= 1e-5
    assert alike.sum() >= 32
    assert deviation(found["gradient"], expected["gradient"])[alike].max() <= 1e-5
    assert np.median(deviation(exact["gradient"], expected["gradient"])) > 1e-3


class Half(torch.nn.Module):
    """A product that rounds its weights, input and output to float16 and differentiates as if it did not."""

    def __init__(self, product: torch.nn.Module) -> None:
        super().__init__()
        self.product = product
        for parameter in product.parameters():
            parameter.data = parameter.data.half().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x + (x.half().float() - x).detach())
        return y + (y.half().float() - y).detach()


def test_float16_is_rounded_forward_and_float32_backward() -> None:
    model, graph, shape = exported("vgg-small")
    half = copy.deepcopy(simplify(model))  # which shares its weights with the network that other tests read
    for layer in half.layers():
        layer.synapse = Half(layer.synapse)
    half.readout.weight.data = half.readout.weight.data.half().float()
    half.readout.bias.data = half.readout.bias.data.half().float()
    network = ir.to_proto(convert(graph, plan(graph, "fp16")))
    x, y = images(33, shape)
    found, expected = Run(network, "triangle")(x, y), by_torch(half, x, y, "triangle", {}, torch.float32)
    # the readout's own rounding is left out of the oracle, so logits are as near as a float16 is
    alike = np.abs(found["logits"] - expected.logits).max(1) <= 1e-3
    assert alike.sum() >= 32
    assert deviation(found["gradient"], expected.gradient)[alike].max() <= 2e-3
    backward = [node for node in Run(network, "triangle").graph.graph.node if node.name.startswith("backward/")]
    assert not any(a.i == TensorProto.FLOAT16 for node in backward for a in node.attribute if a.name == "to")


def test_weights_are_stored_once_and_the_forward_part_is_the_network_itself() -> None:
    network = ir.to_proto(exported("wrn16-4")[1])
    graph = attack_graph(network, "triangle").graph
    assert list(graph.node)[: len(network.graph.node)] == list(network.graph.node)
    assert list(graph.initializer)[: len(network.graph.initializer)] == list(network.graph.initializer)
    added = graph.initializer[len(network.graph.initializer) :]
    assert max(np.prod(tensor.dims) for tensor in added) <= 10  # axes, shapes, numbers of classes
    assert [value.name for value in graph.input] == ["images", "classes", "width", "loss"]
    assert [value.name for value in graph.output] == ["logits", "ce", "dlr", "gradient"]


def test_the_same_network_gives_the_same_bytes_in_every_process(precise: Bundle) -> None:
    here = {p: hashlib.sha256(derived(precise.variant(p), "triangle")).hexdigest() for p in ("fp32", "fp8")}
    script = """import sys, hashlib, pathlib; from mpdsgr_deploy.attack_graph import derived
print(hashlib.sha256(derived(pathlib.Path(sys.argv[1]), "triangle")).hexdigest())
print([m for m in ("torch", "onnxruntime") if m in sys.modules])"""
    for precision, seed in (("fp32", "1"), ("fp8", "2")):
        command = [sys.executable, "-c", script, str(precise.variant(precision))]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        assert done.stdout.split("\n")[:2] == [here[precision], "[]"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inspect_writes_the_attack_graph_that_tensorrt_builds(precision: str, precise: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "attack.onnx"
    done = mpdsgr_here("inspect", f"{precise.path}@{precision}", "--attack-graph", file)
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(onnx.load(file), full_check=True)
    x, y = images(4, SMALL)
    with (
        Session(file, CPU, source=file) as written,
        GraphAttacker(precise.variant(precision), trained_surrogate(precise.manifest.recipe)) as derived_in_memory,
    ):
        inputs = {"images": x, "classes": y, "width": np.array(1, np.float32), "loss": np.array(0, np.float32)}
        (gradient,) = written(inputs, ["gradient"])
        assert np.array_equal(gradient, derived_in_memory(x, y).gradient)
    assert len(build_engine("tensorrt-rtx", file, (1, 2, 8))) > 10_000


def test_inspect_refuses_what_does_not_go_with_an_attack_graph(precise: Bundle, tmp_path: Path) -> None:
    for path, arguments, complaint in (
        (precise.path, ["--attack-graph", precise.path / "attack.onnx"], "is inside the bundle"),
        (precise.path, ["--attack-graph", tmp_path / "none" / "attack.onnx"], "cannot write"),
        (precise.path, ["--attack-graph", tmp_path / "attack.onnx", "--flips"], "--attack-graph ignores --flips"),
        (f"{precise.path}@int4", ["--attack-graph", tmp_path / "attack.onnx"], "has no precision 'int4'"),
    ):
        assert_input_error(mpdsgr_here("inspect", path, *arguments), complaint)
    assert not (tmp_path / "attack.onnx").exists()


@pytest.mark.parametrize("surrogate", ["adaptive", "rate", "rectangular"])
def test_tensorrt_builds_every_kind_of_backward_pass(surrogate: str, tmp_path: Path) -> None:
    save(learned("dlif", "direct")[1], tmp_path / "model.onnx")
    (tmp_path / "attack.onnx").write_bytes(derived(tmp_path / "model.onnx", surrogate))
    assert build_engine("tensorrt-rtx", tmp_path / "attack.onnx", (1, 2, 8))
