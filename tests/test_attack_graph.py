"""The attack graph against torch's autograd, finite differences and formulas."""

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import assert_input_error, mpdsgr_here, small_recipe
from exporting_once import to_graph
from onnx import TensorProto
from test_export import NAMES, exported, learned
from test_stochastic_export import exported as exported_stochastic
from torch.nn import functional as F

from mpdsgr_deploy.attack_graph import attack_graph, derived
from mpdsgr_deploy.attack_graph.artefact import NetworkFile
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.attacks.attacker_surrogate import with_surrogate
from mpdsgr_deploy.attacks.torch_target import cross_entropy, input_gradient
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.exporting.precision import FORMATS, PRECISIONS, convert, plan, products, rounded_weights
from mpdsgr_deploy.models import SpikingNet, build_model
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.recipe import SWEEP
from mpdsgr_deploy.runtime import NoiseSource
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.session import CPU, Session
from mpdsgr_deploy.runtime.tensorrt import build_engine
from mpdsgr_deploy.runtime.torch_model import noise_inputs
from mpdsgr_deploy.snn import Surrogate, Trace
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
SMALL = (1, 8, 8)


@cache
def frames() -> tuple[SpikingNet, ir.Model, tuple[int, int, int]]:
    """A warmed-up network of event frames, its graph and the shape of its images."""
    torch.manual_seed(0)
    shape, model = (6, 8, 8), build_model(small_recipe(encoding={"name": "frames"}), (6, 8, 8), 10)
    for layer in model.layers():
        layer.norm.momentum = 1.0
    model(torch.rand(32, *shape))
    return model.eval(), to_graph(simplify(model), shape), shape


NETWORKS: dict[str, Callable[[], tuple[SpikingNet, ir.Model, tuple[int, int, int]]]] = {
    **{name: lambda name=name: exported(name) for name in NAMES},  # type: ignore[misc]
    "soft reset": lambda: exported("vgg-small", "soft"),
    "poisson": lambda: (*exported_stochastic("poisson"), SMALL),
    "rsc and stog": lambda: (*exported_stochastic("rsc and stog"), SMALL),
    "feel": lambda: (*learned("feel", "frequency"), SMALL),
    "dlif": lambda: (*learned("dlif", "direct"), SMALL),
    "frames": frames,
}


def images(count: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.random((count, *shape), np.float32), draw.integers(0, 10, count)


class Run:
    """An attack graph in a session of its own: every output by name."""

    def __init__(self, network: onnx.ModelProto, surrogate: str) -> None:
        self.graph = attack_graph(network, surrogate)
        onnx.checker.check_model(self.graph, full_check=True)
        self.width = parse_surrogate(surrogate).width
        self.session = Session(self.graph, CPU, source="the test")

    def __call__(self, x: np.ndarray, y: np.ndarray, loss: float = 0, **further: np.ndarray) -> dict[str, np.ndarray]:
        scalars = {"width": np.array(self.width, np.float32), "loss": np.array(loss, np.float32)}
        inputs = {"images": x, "classes": y, **scalars, **further}
        return dict(zip(self.session.outputs, self.session(inputs, self.session.outputs), strict=True))


def by_torch(model: SpikingNet, x: np.ndarray, y: np.ndarray, surrogate: str, noise: Any, dtype: Any) -> Gradient:
    """Autograd's answer, in float32 or float64."""
    attacked = with_surrogate(model, surrogate).to(dtype)
    draws = [torch.from_numpy(draw).to(dtype) for draw in noise.values()]
    tensor = torch.from_numpy(x).to(dtype)

    def loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, classes)

    found = input_gradient(lambda x: attacked(x, None, draws), tensor, torch.from_numpy(y), loss)
    return Gradient(*(part.double().numpy() for part in found))


def deviation(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each image's gradient, in its largest component, relative to that [B]."""
    return np.abs(found - expected).max((1, 2, 3)) / np.abs(expected).max((1, 2, 3)).clip(1e-30)


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
    torch.manual_seed(0)
    recipe = small_recipe(neuron={"detach_reset": True})
    model = build_model(recipe, SMALL, 10)
    for layer in model.layers():
        layer.norm.momentum = 1.0
    model(torch.rand(32, *SMALL))
    model.eval()
    run = Run(ir.to_proto(to_graph(simplify(model), SMALL)), trained_surrogate(recipe))
    x, y = images(9, SMALL)
    pixels = torch.from_numpy(x).requires_grad_()
    loss = F.cross_entropy(model(pixels), torch.from_numpy(y), reduction="sum")
    (expected,) = torch.autograd.grad(loss, pixels)
    np.testing.assert_allclose(run(x, y)["gradient"], expected, rtol=1e-3, atol=1e-6)
    attached = Run(ir.to_proto(to_graph(simplify(model), SMALL)), "triangle:1")(x, y)["gradient"]
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
        ("triangle:1+detached+averaged", "nothing on to resets"),
    ],
)
def test_a_wrong_surrogate_is_one_line(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse_surrogate(name)


def logits_network(count: int, extra: str = "Identity") -> onnx.ModelProto:
    """Images [batch, 1, 1, K] that are their own logits, through one more operator."""
    text = f"""<ir_version: 10, opset_import: ["": 21]> own (float[batch, 1, 1, {count}] images)
        => (float[batch, {count}] logits) <int64[2] shape = {{-1, {count}}}> {{
            {"" if extra == "Identity" else f"changed = {extra} (images)"}
            logits = Reshape ({"images" if extra == "Identity" else "changed"}, shape)
        }}"""
    return onnx.parser.parse_model(text)


def dlr(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """By its definition, one image at a time."""
    found = []
    for row, k in zip(z, y.tolist(), strict=True):
        wrong = torch.cat([row[:k], row[k + 1 :]])
        ordered = row.sort(descending=True).values
        gap = row[k] - wrong.max() if len(wrong) else 0 * row[k]
        found.append(-gap / (ordered[0] - ordered[2] + 1e-12) if len(row) > 2 else -gap)
    return torch.stack(found)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_both_losses_and_their_mixture_have_autograds_gradient(count: int) -> None:
    run = Run(logits_network(count), "triangle")
    draw = np.random.default_rng(1)
    x = draw.normal(0, 2, (64, 1, 1, count)).astype(np.float32)
    y = draw.integers(0, count, 64)
    z, classes = torch.from_numpy(x[:, 0, 0]).double().requires_grad_(), torch.from_numpy(y)
    ce, ratio = F.cross_entropy(z, classes, reduction="none"), dlr(z, classes)
    for loss in (0.0, 1.0, 0.25):
        found = run(x, y, loss)
        np.testing.assert_allclose(found["ce"], ce.detach(), atol=1e-5)
        np.testing.assert_allclose(found["dlr"], ratio.detach(), atol=1e-4, rtol=1e-5)
        (gradient,) = torch.autograd.grad(((1 - loss) * ce + loss * ratio).sum(), z, retain_graph=True)
        np.testing.assert_allclose(found["gradient"][:, 0, 0], gradient, rtol=2e-4, atol=1e-5)


def test_finite_differences_of_the_losses() -> None:
    run = Run(logits_network(5), "triangle")
    draw = np.random.default_rng(2)
    x, y, h = draw.normal(0, 2, (16, 1, 1, 5)).astype(np.float32), draw.integers(0, 5, 16), 1e-2
    for loss, name in ((0.0, "ce"), (1.0, "dlr")):
        gradient = run(x, y, loss)["gradient"]
        for k in range(5):
            step = np.zeros_like(x)
            step[..., k] = h
            difference = (run(x + step, y)[name] - run(x - step, y)[name]) / (2 * h)
            close = np.abs(difference - gradient[:, 0, 0, k]) < 1e-2 * (1 + np.abs(difference))
            assert close.sum() >= 15  # a kink of DLR may lie between


def test_an_operator_without_a_rule_is_named() -> None:
    with pytest.raises(InputError, match=r"node changed \(Cos\) is an operator without a rule"):
        attack_graph(logits_network(3, "Cos"), "triangle")


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
        GraphAttacker.from_bundle(precise, precision) as derived_in_memory,
    ):
        inputs = {"images": x, "classes": y, "width": np.array(1, np.float32), "loss": np.array(0, np.float32)}
        (gradient,) = written(inputs, ["gradient"])
        assert np.array_equal(gradient, derived_in_memory(x, y).gradient)
    assert len(build_engine("tensorrt-rtx", file, (1, 2, 8))) > 10_000


def test_inspect_refuses_what_does_not_go_with_an_attack_graph(precise: Bundle, tmp_path: Path) -> None:
    for path, arguments, complaint in (
        (precise.path, ["--attack-graph", precise.path / "attack.onnx"], "lies in the bundle"),
        (precise.path, ["--attack-graph", tmp_path / "none" / "attack.onnx"], "cannot write"),
        (precise.path, ["--attack-graph", tmp_path / "attack.onnx", "--flips"], "leave out other options"),
        (f"{precise.path}@int4", ["--attack-graph", tmp_path / "attack.onnx"], "has no precision 'int4'"),
    ):
        assert_input_error(mpdsgr_here("inspect", path, *arguments), complaint)
    assert not (tmp_path / "attack.onnx").exists()


@pytest.mark.parametrize("surrogate", ["adaptive", "rate", "rectangular"])
def test_tensorrt_builds_every_kind_of_backward_pass(surrogate: str, tmp_path: Path) -> None:
    save(learned("dlif", "direct")[1], tmp_path / "model.onnx")
    (tmp_path / "attack.onnx").write_bytes(derived(tmp_path / "model.onnx", surrogate))
    assert build_engine("tensorrt-rtx", tmp_path / "attack.onnx", (1, 2, 8))


def attacker(name: str, folder: Path, surrogate: str = "triangle", **options: Any) -> GraphAttacker:
    model, graph, shape = NETWORKS[name]()
    save(graph, folder / "model.onnx")
    return GraphAttacker(folder / "model.onnx", surrogate, noise=noise_inputs(model, shape), **options)


def test_chunks_do_not_change_the_answer(tmp_path: Path) -> None:
    x, y = images(33, (3, 16, 16))
    with (
        attacker("vgg-small", tmp_path, settings=RuntimeSettings(threads=1)) as whole,
        attacker("vgg-small", tmp_path, settings=RuntimeSettings(threads=1, chunk=4)) as parts,
    ):
        for a, b in zip(whole(x, y), parts(x, y), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        with pytest.raises(InputError, match="pixels must be"):
            whole(x + 1, y)


def test_noise_is_fresh_seeded_and_averaged(tmp_path: Path) -> None:
    x, y = images(6, SMALL)
    with attacker("rsc and stog", tmp_path, seed=5) as one, attacker("rsc and stog", tmp_path, seed=5, draws=2) as two:
        first, second = one(x, y), one(x, y)
        assert not np.array_equal(first.gradient, second.gradient)
        for a, b, mean in zip(first, second, two(x, y), strict=True):
            np.testing.assert_allclose((a + b) / 2, mean, atol=1e-6)
    with pytest.raises(InputError, match="takes the noise"):
        GraphAttacker(tmp_path / "model.onnx", "triangle")


def test_adaptive_is_assg_by_its_formula(tmp_path: Path) -> None:
    """Two evaluations against torch with a sharpness of its own for each neuron; the second of half of the images."""
    model, _, shape = exported("vgg-small")
    x, y = images(8, shape)
    rows = np.arange(0, 8, 2)
    states: dict[str, list[np.ndarray]] = {}
    with attacker("vgg-small", tmp_path, "adaptive") as run:
        state = run.start(8)
        for chosen in (slice(None), rows):
            state = {name: value[chosen] for name, value in state.items()}
            states = {layer: [pair[chosen] for pair in pairs] for layer, pairs in states.items()}
            found, state = run.step(x[chosen], y[chosen], state)
            expected = assg(model, x[chosen], y[chosen], states)
            np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
            assert deviation(found.gradient, expected.gradient).max() <= 1e-5
            for layer, (mean, spread) in states.items():
                np.testing.assert_allclose(state[f"mean/{layer}"], mean, atol=1e-5)
                np.testing.assert_allclose(state[f"deviation/{layer}"], spread, atol=1e-5)
            x = (x + 0.05).clip(0, 1)


def assg(model: SpikingNet, x: np.ndarray, y: np.ndarray, states: dict[str, list[np.ndarray]]) -> Gradient:
    """By torch; moves `states`, the mean and the deviation [B, T, ...] of each layer."""
    attacked = with_surrogate(model, "triangle")
    sharpness: dict[str, list[torch.Tensor]] = {}

    def observe(trace: Trace) -> None:
        v = torch.stack([s.u for s in trace.states], 1).double().numpy() - trace.neuron.v_threshold
        mean, spread = states.get(trace.layer, [np.ones_like(v), np.zeros_like(v)])
        mean = 0.9 * mean + 0.1 * np.abs(v)
        spread = 0.9 * spread + 0.1 * np.abs(np.abs(v) - mean)
        states[trace.layer] = [mean, spread]
        s = 2 / np.pi * np.tan(0.4 * np.pi) / (mean + 1.5 * spread + 1e-4)
        sharpness[trace.layer] = list(torch.from_numpy(s).float().unbind(1))

    with torch.no_grad():
        attacked(torch.from_numpy(x), observe)

    def derivative(layer: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def arctangent(v: torch.Tensor) -> torch.Tensor:
            s = sharpness[layer].pop()  # backpropagation goes from the last step to the first
            return s / 2 / (1 + (torch.pi / 2 * s * v) ** 2)

        return arctangent

    for layer in attacked.layers():
        layer.neuron.surrogate = Surrogate("assg", derivative(layer.name), float("inf"))
    found = input_gradient(attacked, torch.from_numpy(x), torch.from_numpy(y))
    return Gradient(*(part.numpy() for part in found))


def test_attackers_of_one_kind_share_the_weights_and_answer_as_alone(bundle: Bundle) -> None:
    model = bundle.variant("fp32")
    draw = np.random.default_rng(0)
    x, y = draw.random((3, *bundle.manifest.input_shape), np.float32), np.array([0, 1, 2])
    network = NetworkFile(model, lambda x: x)
    names = [("triangle:1", "ce"), ("triangle:0.5", "dlr"), ("triangle:1+averaged", "ce"), ("triangle:1", "ce")]
    names += [("triangle:1+detached", "ce"), ("triangle:1", "weighted")]
    shared = [network.attacker(name, loss=loss, draws=1) for name, loss in names]
    sessions = [attacker._session for attacker in shared]
    assert sessions[0] is sessions[1]
    assert len(set(map(id, sessions))) == 5
    with shared[0], shared[1]:
        pass
    for attacker, (name, loss) in zip(shared, names, strict=True):
        with GraphAttacker(model, name, loss=loss) as alone:
            towards = np.eye(10, dtype=np.float32)[y] if loss == "weighted" else y
            for own, expected in zip(attacker(x, towards), alone(x, towards), strict=True):
                np.testing.assert_array_equal(own, expected)
