"""Spikes that differ between precisions, against hand-made networks and torch's own traces."""

from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import T
from onnx import TensorProto, helper, numpy_helper

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.diagnostics.flip_plots import by_density, by_layer
from mpdsgr_deploy.diagnostics.operation_counts import macs, parameters
from mpdsgr_deploy.diagnostics.spike_flips import SpikeFlips, StepFlips, compare_spikes, flips_of
from mpdsgr_deploy.diagnostics.trace import Recorder
from mpdsgr_deploy.exporting.precision import FORMATS, convert, plan, rounded_weights
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import fold_norm, simplify
from mpdsgr_deploy.runtime.float16_on_cpu import rounded_as_written
from mpdsgr_deploy.snn import Trace
from mpdsgr_deploy.trained_networks import load_model

PRECISIONS = ("fp16", "int8", "fp8")


@pytest.fixture(scope="module")
def measured(precise: Bundle) -> dict[str, SpikeFlips]:
    return {flips.precision: flips for flips in flips_of(precise, images=300)[1]}


def network(bundle: Bundle) -> SpikingNet:
    manifest = bundle.manifest
    return load_model(bundle.file("weights.safetensors"), manifest.recipe, manifest.input_shape, len(manifest.labels))


def traced(model: SpikingNet, x: np.ndarray) -> dict[str, Trace]:
    traces: dict[str, Trace] = {}
    with torch.no_grad():
        model(torch.from_numpy(x), lambda trace: traces.update({trace.layer: trace}))
    return traces


def test_recorded_potentials_and_spikes_are_those_that_torch_observes(precise: Bundle) -> None:
    x = load_test(precise.manifest.recipe.data)[:8].unit()
    recorded = Recorder(onnx.load(precise.variant("fp32")))(x)
    traces = traced(network(precise), x)
    assert list(recorded.spikes) == [f"{layer}/{t}" for layer in traces for t in range(T)]
    for layer, trace in traces.items():
        for t, (u, spikes) in enumerate(trace.states):
            np.testing.assert_allclose(recorded.potentials[f"{layer}/{t}"], u.numpy(), rtol=0, atol=1e-5)
            np.testing.assert_array_equal(recorded.spikes[f"{layer}/{t}"], spikes.numpy())


def two_layers(bias: float) -> onnx.ModelProto:
    """Four neurons a layer, T = 2, tau 0.5, threshold 1: a driven by x + bias, b by 1.5 times the spikes of a."""
    constants = {"bias": bias, "one": 1.0, "tau": 0.5, "weight": 1.5}
    nodes = [helper.make_node("Add", ["images", "bias"], ["potential/a/0"])]

    def neuron(layer: str, currents: list[str]) -> None:
        for t, current in enumerate(currents):
            u, spikes = f"potential/{layer}/{t}", f"spikes/{layer}/{t}"
            if t:
                before = f"{layer}/{t - 1}"
                nodes.extend(
                    [
                        helper.make_node("Sub", ["one", f"spikes/{before}"], [f"kept/{u}"]),
                        helper.make_node("Mul", [f"potential/{before}", f"kept/{u}"], [f"reset/{u}"]),
                        helper.make_node("Mul", [f"reset/{u}", "tau"], [f"leaked/{u}"]),
                        helper.make_node("Add", [f"leaked/{u}", current], [u]),
                    ]
                )
            nodes.append(helper.make_node("GreaterOrEqual", [u, "one"], [f"fires/{u}"]))
            nodes.append(helper.make_node("Cast", [f"fires/{u}"], [spikes], to=TensorProto.FLOAT))

    neuron("a", ["potential/a/0"] * 2)
    nodes.append(helper.make_node("Mul", ["spikes/a/0", "weight"], ["potential/b/0"]))
    nodes.append(helper.make_node("Mul", ["spikes/a/1", "weight"], ["current/b/1"]))
    neuron("b", ["potential/b/0", "current/b/1"])
    nodes.append(helper.make_node("Add", ["spikes/b/0", "spikes/b/1"], ["logits"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "two",
        [value("images", TensorProto.FLOAT, ["batch", 4])],
        [value("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.float32(number), name) for name, number in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_one_flip_is_found_where_it_happens_and_where_it_is_passed_on() -> None:
    """x + 0.05 takes the last neuron of the first image to 1.01; whatever then differs follows from this spike."""
    x = np.array([[0.2, 0.5, 0.8, 0.96], [0.2, 0.5, 0.8, 0.8]], np.float32)
    (flips,) = compare_spikes(two_layers(0.0), {"nudged": two_layers(0.05)}, x, v_threshold=1.0)
    steps = {(step.layer, step.t): step for step in flips.steps}
    assert {key: step.rate for key, step in steps.items()} == {
        ("a", 0): 1 / 8,
        ("a", 1): 0,  # 0.5 * 0.96 + 0.96 and, after its reset, 1.01: it fires either way
        ("b", 0): 1 / 8,
        ("b", 1): 0,
    }
    assert {key: step.fresh for key, step in steps.items()} == {("a", 0): 1 / 8, ("a", 1): 0, ("b", 0): 0, ("b", 1): 0}
    assert [step.first for step in flips.steps] == [1, 0, 0, 0]
    assert (flips.n, flips.unflipped) == (2, 1)
    assert steps["a", 0].moved == pytest.approx(0.05)
    # 0.05 a step and what leaks of the one before, 0.075; but 1.44 becomes 1.01 where the reset takes the rest
    assert steps["a", 1].moved == pytest.approx((7 * 0.075 + 0.43) / 8)
    assert steps["a", 1].fresh_moved == pytest.approx(0.075)
    assert (steps["b", 0].moved, steps["b", 0].fresh_moved) == (pytest.approx(1.5 / 8), 0)
    assert steps["a", 0].density == pytest.approx(1 / 8 / 0.1)  # 0.96 alone lies within 0.05
    assert (steps["a", 0].firing_rate, steps["a", 1].firing_rate) == (0, 4 / 8)
    # float32 says 0, 0, 1, 1 and 0, 0, 1, 1; the variant 0, 0, 1, 2 for the first image
    assert flips.labels_changed == 1
    assert flips.logits_moved == pytest.approx(1 / 8)


def test_the_same_network_has_no_flips_and_batches_do_not_matter(precise: Bundle) -> None:
    x = load_test(precise.manifest.recipe.data)[:11].unit()
    fp32, int8 = (onnx.load(precise.variant(p)) for p in ("fp32", "int8"))
    same, whole = compare_spikes(fp32, {"same": fp32, "int8": int8}, x, 1.0)
    assert {(step.rate, step.moved, step.fresh, step.fresh_moved, step.first) for step in same.steps} == {(0,) * 5}
    assert (same.labels_changed, same.unflipped, same.logits_moved) == (0, 11, 0)
    parts = [compare_spikes(fp32, {"int8": int8}, x[a:b], 1.0)[0] for a, b in pairwise((0, 5, 11))]
    for step, first, second in zip(whole.steps, *(part.steps for part in parts), strict=True):
        assert step.rate == pytest.approx((5 * first.rate + 6 * second.rate) / 11)
        assert step.density == pytest.approx((5 * first.density + 6 * second.density) / 11)
        assert step.first == first.first + second.first
    assert sum(step.first for step in whole.steps) + whole.unflipped == 11


def test_int8_flips_the_spikes_that_torch_flips_with_rounded_weights(
    precise: Bundle, measured: dict[str, SpikeFlips]
) -> None:
    x = load_test(precise.manifest.recipe.data)[:300].unit()
    model = network(precise)
    rounded = simplify(model, [fold_norm])
    for layer in rounded.layers()[1:]:
        weights, scales = rounded_weights(layer.synapse.weight.detach().numpy(), FORMATS["int8"], np.dtype(np.float32))
        layer.synapse.weight.data = torch.from_numpy(weights * scales[:, None, None, None]).float()
    before, after = traced(model, x), traced(rounded, x)
    for step in measured["int8"].steps:
        (u, spikes), (moved, flipped) = before[step.layer].states[step.t], after[step.layer].states[step.t]
        assert step.rate == pytest.approx((spikes != flipped).float().mean().item(), abs=1e-4)
        assert step.moved == pytest.approx((u - moved).abs().mean().item(), rel=0.02, abs=1e-6)
        near = ((u - 1).abs() < 0.05).float().mean().item()
        assert step.density == pytest.approx(near / 0.1, abs=1e-4)
        assert step.firing_rate == pytest.approx(spikes.mean().item(), abs=1e-4)
    assert measured["int8"].mean("rate", "conv1") == 0  # its product and its neurons are float32
    assert measured["int8"].mean("rate", "conv3") > 0


def test_drift_starts_where_rounding_starts_and_grows(measured: dict[str, SpikeFlips]) -> None:
    for precision, start in (("fp16", "conv1"), ("int8", "conv2"), ("fp8", "conv2")):
        flips = measured[precision]
        begun = next(step for step in flips.steps if step.layer == start)
        assert begun.t == 0
        assert begun.rate == begun.fresh  # nothing upstream differs
        assert flips.mean("rate", "conv3") > flips.mean("fresh", "conv3") > 0
        # a flip is a potential that rounding carries across the threshold: density times movement, counted on few
        steps = [step for step in flips.steps if step.fresh > 0]
        law = sum(step.density * step.fresh_moved for step in steps)
        assert sum(step.fresh for step in steps) == pytest.approx(law, rel=0.5)
    rates = [measured[precision].mean("fresh") for precision in PRECISIONS]
    assert rates == sorted(rates)


def test_float16_is_rounded_as_numpy_rounds_it() -> None:
    """0.1 x + y in float16: the weight, the product and the sum are rounded, each once."""
    half = TensorProto.FLOAT16
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=half),
        helper.make_node("Mul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "x"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["logits"], to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "half",
        [value("images", TensorProto.FLOAT, ["n"])],
        [value("logits", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.float16(0.1), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    import onnxruntime

    rewritten = rounded_as_written(model)
    onnx.checker.check_model(rewritten, full_check=True)
    session = onnxruntime.InferenceSession(rewritten.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    (found,) = session.run(None, {"images": x})
    exact = x.astype(np.float16)
    expected = (exact * np.float16(0.1) + exact).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert (expected != (x * np.float32(np.float16(0.1)) + x).astype(np.float16)).mean() > 0.1  # the roundings matter


def test_the_costs_are_those_counted_from_the_torch_modules(precise: Bundle) -> None:
    model = network(precise)
    folded = simplify(model, [fold_norm])
    # beside the parameters the image's mean and deviation, and the weights of the T outputs
    numbers = sum(parameter.numel() for parameter in folded.parameters()) + 2 + T
    counted: dict[str, int] = {}

    def count(name: str, module: torch.nn.Module, output: torch.Tensor) -> None:
        steps = T if name == "readout" else 1  # its output is the sum over T steps, others have them in the batch
        counted[name] = steps * output.numel() * module.weight[0].numel()

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda m, _, output, name=name: count(name, m, output))
    model(torch.rand(1, 1, 8, 8))
    products = list(counted.values())
    assert products[0] == T * 8 * 8 * model.layers()[0].synapse.out_channels * 9  # 3x3 on one channel
    for precision in precise.manifest.variants:
        file = onnx.load(precise.variant(precision))
        assert parameters(file) == numbers
        assert macs(file, T).naive == sum(products)
        assert macs(file, T).exported == sum(products[1:-1]) + (products[0] + products[-1]) // T


def test_plots_draw_every_layer_and_only_what_a_logarithm_has(measured: dict[str, SpikeFlips]) -> None:
    figure = by_layer(list(measured.values()))
    assert len(figure.axes) == 3
    for axes, flips in zip(figure.axes, measured.values(), strict=True):
        drawn = [line.get_ydata() for line in axes.lines]
        assert len(drawn) == T + 1
        np.testing.assert_allclose(drawn[1], [100 * s.rate for s in flips.steps if s.t == 1])
        np.testing.assert_allclose(drawn[T], [100 * flips.mean("fresh", layer) for layer in flips.layers()])
        labels = [line.get_label() for line in axes.lines]
        assert labels == [*(f"all flips, t = {t + 1}" for t in range(T)), "own rounding, all steps"]
    figure.draw_without_rendering()
    inside, legend = figure.bbox.extents, figure.legends[0].get_window_extent().extents
    assert inside[0] <= legend[0]
    assert legend[2] <= inside[2]  # a legend that is cut off loses the first step
    right = by_density(list(measured.values())).axes[1]
    assert len(right.lines) == 3 + 1
    assert all(np.all(np.asarray(line.get_ydata()) > 0) for line in right.lines)
    nothing = SpikeFlips("same", 1, 0, 1, 0.0, [StepFlips("a", 0, 0.1, 0.2, 0.0, 0.0, 0.0, 0.0, 0)])
    assert by_layer([nothing]).axes[0].lines
    assert by_density([nothing]).axes


def test_a_variant_leaves_the_types_of_the_graph_it_was_made_from(bundle: Bundle) -> None:
    graph = ir.load(bundle.variant("fp32"))
    before = ir.to_proto(graph).SerializeToString()
    for precision in PRECISIONS:
        convert(graph, plan(graph, precision), "fp16")
    assert ir.to_proto(graph).SerializeToString() == before
