import copy
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
import torch
from conftest import small_recipe
from exporting_once import to_graph, written

from mpdsgr_deploy.bundle import WEIGHTS, Bundle
from mpdsgr_deploy.data import load_test, load_training
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.exporting import export, onnx_writer
from mpdsgr_deploy.exporting.onnx_writer import save, tidy
from mpdsgr_deploy.models import MODELS, SpikingNet, build_model
from mpdsgr_deploy.models.simplify import PASSES, Pass, encode_once, fold_norm, simplify, sum_before_readout
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.recipe import Data, Recipe
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.snn import LIFState, SpikingLayer, lif
from mpdsgr_deploy.trained_networks import load_model

NAMES = [name for name in MODELS if not name.startswith("plain-")]  # without those that only an experiment registers


def warmed_up(name: str, shape: tuple[int, int, int], reset: str, readout: str = "mean") -> SpikingNet:
    """A random network whose tdBN has seen data and has a lambda and beta worth folding."""
    torch.manual_seed(0)
    detached = name == "vgg-small" and reset == "hard"  # for training alone: every attack says whether it detaches
    # the exporter takes as long as there are layers times steps
    values = {
        "model": {"name": name, "width": 0.1, "readout": readout},
        "encoding": {"T": {"vgg-small": 2, "wrn16-4": 2}.get(name, 1)},
        "neuron": {"reset": reset, "v_threshold": 0.8, "detach_reset": detached},
    }
    model = build_model(Recipe.model_validate(values), shape, 10)
    model.normalize.set([0.4] * shape[0], [0.3] * shape[0])
    for layer in model.layers():
        if layer.norm is None:
            layer.synapse.weight.data *= 8  # at its initial scale a fully connected layer never fires
        else:
            torch.nn.init.uniform_(layer.norm.weight, 0.8, 1.5)
            torch.nn.init.uniform_(layer.norm.bias, 0.0, 0.5)
            layer.norm.momentum = 1.0  # one pass settles the running statistics
    model(torch.rand(32, *shape))
    return model.eval()


def exported(name: str, reset: str = "hard") -> tuple[SpikingNet, ir.Model, tuple[int, int, int]]:
    """A network, its graph and the shape of its images, for tests to read: the exporter takes its time."""
    return exported_once(name, reset)


@cache  # which takes f(x) and f(x, "hard") for different calls
def exported_once(name: str, reset: str) -> tuple[SpikingNet, ir.Model, tuple[int, int, int]]:
    shape = (3, 32, 32) if name == "vgg16" else (3, 16, 16)  # it halves its input five times
    model = warmed_up(name, shape, reset)
    return model, to_graph(simplify(model), shape), shape


@pytest.mark.parametrize(("name", "reset"), [("vgg-small", "soft"), *((name, "hard") for name in NAMES)])
def test_every_model_exports_exactly_with_a_dynamic_batch(name: str, reset: str, tmp_path: Path) -> None:
    model, graph, shape = exported(name, reset)
    save(graph, tmp_path / "model.onnx")
    reference = TorchModel(model, shape)
    draw = np.random.default_rng(0)
    with OnnxRuntime(tmp_path / "model.onnx") as artefact:
        for batch in (1, 2, 5, 33):
            x = draw.random((batch, *shape), np.float32)
            parity = compare(reference(x), artefact(x))
            assert parity.labels_differ == 0
            assert parity.max_abs <= 1e-5, parity
    assert reference(x).std(0).max() > 0.01  # the network does answer its input


@cache
def learned(defence: str, encoding: str) -> tuple[SpikingNet, ir.Model]:
    """A random network whose neurons have parameters of their own, and its graph, for images [1, 8, 8]."""
    torch.manual_seed(0)
    recipe = small_recipe(defence={defence: {}}, encoding={"name": encoding})
    model, _ = build_defended(recipe, (1, 8, 8), 10)
    for layer in model.layers():
        for parameter in layer.neuron.parameters():
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        layer.norm.momentum = 1.0
    model(torch.rand(32, 1, 8, 8))
    return model.eval(), to_graph(simplify(model), (1, 8, 8))


@pytest.mark.parametrize(("defence", "encoding"), [("feel", "frequency"), ("dlif", "direct")])
def test_learned_neurons_and_frequencies_are_exported(defence: str, encoding: str, tmp_path: Path) -> None:
    model, graph = learned(defence, encoding)
    save(graph, tmp_path / "model.onnx")
    x = np.random.default_rng(0).random((33, 1, 8, 8), np.float32)
    with OnnxRuntime(tmp_path / "model.onnx") as artefact:
        assert compare(TorchModel(model, (1, 8, 8))(x), artefact(x)).holds


def test_folding_is_the_same_function_and_leaves_no_tdbn() -> None:
    model = warmed_up("vgg11", (3, 16, 16), "hard")
    folded = simplify(model, [fold_norm])
    assert all(layer.norm is None for layer in folded.body if isinstance(layer, SpikingLayer))
    assert any(layer.norm is not None for layer in model.body if isinstance(layer, SpikingLayer))
    layer, plain = folded.body[0], model.body[0]
    x = torch.rand(4, 3, 16, 16)
    expected = plain.norm(plain.synapse(x))
    torch.testing.assert_close(layer.synapse(x), expected, rtol=1e-5, atol=1e-6)


def test_in_a_residual_block_only_the_norm_behind_a_convolution_is_folded() -> None:
    model = warmed_up("wrn16-4", (3, 16, 16), "hard")
    folded = simplify(model, [fold_norm])
    for block, plain in zip(folded.body[1:7], model.body[1:7], strict=True):
        assert block.second.norm is None
        assert block.first.norm is not None
        x = torch.rand(2, plain.second.synapse.in_channels, 8, 8)
        expected = plain.second.norm(plain.second.synapse(x))
        torch.testing.assert_close(block.second.synapse(x), expected, rtol=1e-5, atol=1e-5)
    assert folded.layers()[-1].norm is not None


def step_by_step(model: SpikingNet, x: torch.Tensor) -> torch.Tensor:
    """A plain VGG, unrolled in the most literal way: every layer at every step, nothing folded, nothing shared."""
    states: dict[int, LIFState] = {}
    outputs = []
    for _ in range(model.T):
        value = model.normalize(x)
        for number, module in enumerate(model.body):
            if not isinstance(module, SpikingLayer):
                value = module(value)
                continue
            current = module.synapse(value)
            current = current if module.norm is None else module.norm(current)
            (states[number],) = lif([current], states.get(number), **constants(module))
            value = states[number].spikes
        outputs.append(torch.nn.functional.linear(value, model.readout.weight, model.readout.bias))
    return sum(w * y for w, y in zip(model.readout.over_time, outputs, strict=True))


def constants(layer: SpikingLayer) -> dict[str, object]:
    neuron = layer.neuron
    return {name: getattr(neuron, name) for name in ("tau", "v_threshold", "reset", "surrogate")}


@pytest.mark.parametrize("passes", [(), *((single,) for single in PASSES), PASSES])
def test_every_pass_leaves_the_plain_unrolled_network_as_it_is(passes: tuple[Pass, ...], bundle: Bundle) -> None:
    """On a trained network and 1,000 images; no pass at all is time folded into the batch, which is the model's own."""
    manifest = bundle.manifest
    model = load_model(bundle.file(WEIGHTS), manifest.recipe, manifest.input_shape, 10)
    x = torch.from_numpy(thousand_digits())
    with torch.no_grad():
        expected, found = step_by_step(model, x), simplify(model, passes)(x)
    parity = compare(expected.numpy(), found.numpy())
    assert parity.labels_differ == 0
    assert parity.within_tolerance == 1000, parity


def thousand_digits() -> np.ndarray:
    """1,000 of the digits as float32 [1000, 1, 8, 8]."""
    return load_training(Data(name="digits"))[0][:1000].unit()


def test_parity_of_the_exported_network_on_a_thousand_images(bundle: Bundle) -> None:
    x = thousand_digits()
    with OnnxRuntime(bundle.variant("fp32")) as artefact:
        parity = compare(TorchModel.from_bundle(bundle)(x), artefact(x))
    assert parity.labels_differ == 0
    assert parity.max_abs <= 1e-5, parity


def test_membrane_readout_is_summed_before_the_last_layer() -> None:
    model = warmed_up("vgg-small", (3, 16, 16), "soft", readout="membrane")
    model.readout.bias.data.uniform_(-1, 1)
    x = torch.rand(8, 3, 16, 16)
    torch.testing.assert_close(simplify(model, [sum_before_readout])(x), step_by_step(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg-small", "wrn16-4"])
def test_each_rewrite_of_the_graph_does_what_it_says(name: str) -> None:
    """A product runs once a layer, the first one on B images and the others on T * B; time is one Split, one Concat."""
    model, network, _ = exported(name)
    graph = network.graph
    nodes = Counter(node.op_type for node in graph)
    products = [node for node in graph if node.op_type in ("Conv", "Gemm")]
    first, *others, last = (str(node.outputs[0].shape[0]) for node in products)
    assert (first, last, set(others)) == ("batch", "batch", {f"{model.T}*batch"})
    assert len(products) == sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in model.modules())
    layers = len(model.layers())
    assert nodes["Concat"] == layers
    assert nodes["Split"] == layers - 1  # the first layer's current is the same at every step
    assert nodes.keys().isdisjoint(
        {"Slice", "Squeeze", "Unsqueeze", "Shape", "Expand", "Gather", "Constant", "Identity"}
    )
    assert {n.name for n in products} >= {layer.name for layer in model.layers() if layer.norm is None}
    spikes = [v.name for node in graph for v in node.outputs if v.name.startswith("spikes/")]
    assert spikes == [f"spikes/{layer.name}/{t}" for layer in model.layers() for t in range(model.T)]


def test_an_identity_shortcut_carries_the_image_to_every_step() -> None:
    """At this width a first block does not change the shape, so that its shortcut meets the image, encoded once."""
    recipe = Recipe.model_validate({"model": {"name": "wrn16-4", "width": 0.02}, "encoding": {"T": 3}})
    torch.manual_seed(0)
    model = build_model(recipe, (3, 8, 8), 10)
    model(torch.rand(8, 3, 8, 8))
    assert model.eval().body[1].shortcut is None
    x = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(simplify(model, [encode_once])(x), model(x))


def test_a_single_step_is_exported() -> None:
    """`test_every_model_exports_exactly_with_a_dynamic_batch` has its answers."""
    model, graph, _ = exported("vgg11")
    assert model.T == 1
    spikes = [v.name for node in graph.graph for v in node.outputs if v.name.startswith("spikes/")]
    assert spikes == [f"spikes/{layer.name}/0" for layer in model.layers()]


def test_a_graph_that_tests_share_is_the_export_of_the_weights_put_into_it() -> None:
    """Byte for byte: the graph of one network, with another one's weights."""
    model, _, shape = exported("vgg-small")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other = simplify(other)
    put_in, own = (ir.to_proto(make(other, shape)).SerializeToString() for make in (to_graph, onnx_writer.to_graph))
    assert put_in == own


def test_a_constant_that_weights_share_is_not_replaced_by_those_of_another_network() -> None:
    """The exporter keeps one of equal constants: here a deviation of 1 is the share of the only step too."""
    model = build_model(small_recipe(encoding={"T": 1}), (1, 8, 8), 10).eval()
    assert model.normalize.std.item() == model.readout.over_time.item() == 1
    _, fixed = written(simplify(model), (1, 8, 8))
    assert fixed.keys() & {"normalize.std", "readout.weight"} == {"normalize.std"}


@pytest.mark.parametrize(("T", "last"), [(2, 1), (3, 1), (3, 2)])
def test_steps_are_split_only_where_all_of_them_are_taken(T: int, last: int, tmp_path: Path) -> None:
    """y = x_0 - x_last of x [T * n, 2]: with a step left out, equal parts would be other steps."""
    text = f"""<ir_version: 10, opset_import: ["": 21]> steps (float[rows, 2] images) => (float[batch, 2] logits)
        <int64[3] shape = {{{T}, -1, 2}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] from = {{{last}}},
         int64[1] to = {{{last + 1}}}> {{
            steps = Reshape (images, shape)
            first = Slice (steps, zero, one, zero)
            a = Squeeze (first, zero)
            other = Slice (steps, from, to, zero)
            b = Squeeze (other, zero)
            logits = Sub (a, b)
        }}"""
    network = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    tidy(network)
    save(network, tmp_path / "model.onnx")
    assert ("Split" in {node.op_type for node in network.graph}) == (T == 2)
    x = np.random.default_rng(0).random((6, 2), np.float32)
    steps = x.reshape(T, -1, 2)
    (found,) = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "model.onnx")).run(None, {"images": x})
    np.testing.assert_array_equal(found, steps[0] - steps[last])


def test_the_file_is_clean(bundle: Bundle) -> None:
    network = onnx.load(bundle.variant("fp32"))
    onnx.checker.check_model(network, full_check=True)
    (x,), (y,) = network.graph.input, network.graph.output
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["batch", 1, 8, 8]
    assert (x.name, y.name) == (bundle.manifest.input_name, bundle.manifest.output_name)
    assert not any(node.metadata_props or node.doc_string for node in network.graph.node)
    assert b".py" not in network.SerializeToString()  # no path of the exporting machine
    assert {n.op_type for n in network.graph.node}.isdisjoint(
        {"Shape", "Expand", "BatchNormalization", "If", "Loop", "RandomUniform"}
    )


def test_the_manifest_records_what_was_measured(bundle: Bundle, run_dir: Path) -> None:
    images = load_test(bundle.manifest.recipe.data)[:100]
    with OnnxRuntime(bundle.variant("fp32")) as artefact:
        correct = int((artefact(images.unit()).argmax(1) == images.classes).sum())
    accuracy = bundle.manifest.variants["fp32"].accuracy
    assert (accuracy.data, accuracy.correct, accuracy.n) == ("digits", correct, 100)
    assert correct > 60
    assert bundle.manifest.provenance["export"]["packages"]["torch"]
    assert str(run_dir) not in (bundle.path / "manifest.json").read_text()


def test_without_the_data_set_there_is_a_bundle_but_no_accuracy(run_without_data: Path, tmp_path: Path) -> None:
    written = export(run_without_data, tmp_path / "bundle")
    assert written.manifest.variants["fp32"].accuracy is None
    assert written.golden()[0].shape == (8, 1, 8, 8)
