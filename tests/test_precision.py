"""Precision variants: exact activations, rounded weights, and the accuracy they are allowed to cost."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from stochastic_networks import exported as exported_stochastic
from test_export import NAMES, exported

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.checkpoint import load_checkpoint, save_checkpoint
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.exporting.precision import FORMATS, PRECISIONS, Grid, convert, grids, plan, products, rounded_weights
from mpdsgr_deploy.exporting.precision_loss import drop
from mpdsgr_deploy.golden import golden_rows
from mpdsgr_deploy.parity import TOLERANCE
from mpdsgr_deploy.runtime import OnnxRuntime, open_predictor

SHAPE = (3, 16, 16)
SEED = 0


@pytest.fixture(scope="module")
def graphs() -> dict[str, ir.Model]:
    """One float32 graph of each kind of network, small."""
    return {name: exported(name)[1] for name in NAMES}


def answer(model: ir.Model, x: np.ndarray, folder: Path) -> np.ndarray:
    save(model, folder / "model.onnx")
    with OnnxRuntime(folder / "model.onnx") as network:
        return network(x)


@pytest.mark.parametrize("name", NAMES)
def test_spikes_and_pooled_spikes_have_grids_and_keep_to_them(
    name: str, graphs: dict[str, ir.Model], tmp_path: Path
) -> None:
    graph = graphs[name]
    known = {value.name: grid for value, grid in grids(graph).items()}
    inputs = {layer: known.get(node.inputs[0].name) for layer, node in products(graph).items()}
    first, last = next(iter(inputs)), next(reversed(inputs))
    assert inputs.pop(first) is None  # the image
    inputs.pop(last)  # the mean over time
    assert set(inputs.values()) <= {Grid(1, 1), Grid(0.25, 4)}
    save(graph, tmp_path / "model.onnx")
    network = onnx.load(tmp_path / "model.onnx")
    names = [value for value in known if not value.startswith("ge")]
    network.graph.output.extend(onnx.helper.make_empty_tensor_value_info(value) for value in names)
    onnx.save(network, tmp_path / "watched.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "watched.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(SEED).random((4, *(d for d in graph.graph.inputs[0].shape[1:])), np.float32)
    for value, array in zip(names, session.run(names, {"images": x}), strict=True):
        whole = array / known[value].step
        assert (whole == np.rint(whole)).all()
        assert whole.min() >= 0
        assert whole.max() <= known[value].levels


def test_gated_spikes_have_a_grid_and_noisy_ones_have_none() -> None:
    _, graph = exported_stochastic("rsc and stog")
    known = grids(graph)
    found = [known.get(node.inputs[0]) for node in products(graph).values()]
    assert found[0] is None  # pixels with noise
    assert set(found[1:-1]) == {Grid(1, 1), Grid(0.25, 4)}
    assert set(plan(graph, "int8").values()) == {"fp32", "int8"}


def test_a_poisson_encoding_is_quantised_from_the_first_layer_on() -> None:
    layers = plan(exported_stochastic("poisson")[1], "int8")
    assert list(layers.values()) == ["int8"] * (len(layers) - 1) + ["fp32"]


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_quantised_products_differ_from_float32_by_their_rounded_weights_alone(
    name: str, precision: str, graphs: dict[str, ir.Model], tmp_path: Path
) -> None:
    graph = graphs[name]
    layers = plan(graph, precision)
    assert list(layers.values()).count("fp32") == 2  # the first and the last
    rounded = graph.clone()
    for layer, node in products(rounded).items():
        if layers[layer] == precision:
            weights = node.inputs[1].const_value.numpy()
            values, scales = rounded_weights(weights, FORMATS[precision], np.dtype(np.float32))
            back = values.astype(np.float32) * scales.reshape(-1, *[1] * (weights.ndim - 1))
            assert not np.array_equal(back, weights)
            node.inputs[1].const_value = ir.tensor(back, name=node.inputs[1].name)
    x = np.random.default_rng(SEED).random((33, *graph.graph.inputs[0].shape[1:]), np.float32)
    expected, answers = answer(rounded, x, tmp_path), answer(convert(graph, layers), x, tmp_path)
    for node, layer in zip(products(graph).values(), layers, strict=True):  # the source is as it was
        assert node.name == layer
        assert node.inputs[1].dtype == ir.DataType.FLOAT
    # On any CPU a potential may lie so near the threshold that the order of a float32 sum decides the spike
    assert (np.abs(answers - expected).max(axis=1) <= 1e-5).sum() >= 30


def test_weights_are_rounded_to_the_nearest_step_of_their_channel() -> None:
    normal = np.random.default_rng(SEED).normal(size=(4, 3, 3, 3)).astype(np.float32)
    weights = normal * np.float32([[[[1]]], [[[10]]], [[[0.1]]], [[[0]]]])
    values, scales = rounded_weights(weights, FORMATS["int8"], np.dtype(np.float32))
    assert values.dtype == np.int8
    np.testing.assert_allclose(scales[:3], np.abs(weights).max((1, 2, 3))[:3] / 127, rtol=1e-6)
    wide = scales[:, None, None, None]
    assert (np.abs(values * wide - weights) <= wide * 0.5001).all()
    assert np.abs(values).reshape(4, -1).max(1).tolist() == [127, 127, 127, 0]


@pytest.mark.parametrize("neurons", ["fp32", "fp16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_tensor_has_the_type_its_place_asks_for(
    precision: str, neurons: str, graphs: dict[str, ir.Model], tmp_path: Path
) -> None:
    graph = graphs["wrn16-4"]
    converted = convert(graph, plan(graph, precision), neurons)
    save(converted, tmp_path / "model.onnx")  # the full check of types and shapes
    types = {value.name: value.dtype for node in converted.graph for value in node.outputs}
    wanted = ir.DataType.FLOAT if neurons == "fp32" else ir.DataType.FLOAT16
    assert {kind for name, kind in types.items() if name.startswith(("potential/", "spikes/"))} == {wanted}
    assert types["logits"] == converted.graph.inputs[0].dtype == ir.DataType.FLOAT
    if precision in ("fp32", "fp16"):
        dtype = ir.DataType.FLOAT if precision == "fp32" else ir.DataType.FLOAT16
        assert {node.inputs[1].dtype for node in products(converted).values()} == {dtype}
    assert {node.inputs[1].dtype for node in products(graph).values()} == {ir.DataType.FLOAT}  # the source is as it was
    assert {value.dtype for node in graph.graph for value in node.outputs} >= {ir.DataType.FLOAT, ir.DataType.BOOL}
    assert ir.DataType.FLOAT16 not in {value.dtype for node in graph.graph for value in node.outputs}
    x = np.random.default_rng(SEED).random((2, *SHAPE), np.float32)
    assert np.isfinite(answer(converted, x, tmp_path)).all()


def test_float16_is_within_float16s_rounding_before_the_first_spike_flips(
    graphs: dict[str, ir.Model], tmp_path: Path
) -> None:
    """The first layer's current, which no spike has touched, moves by at most float16's rounding of a sum."""
    potentials = []
    for precision in ("fp32", "fp16"):
        save(convert(graphs["vgg11"], plan(graphs["vgg11"], precision)), tmp_path / "model.onnx")
        network = onnx.load(tmp_path / "model.onnx")
        network.graph.output.append(onnx.helper.make_empty_tensor_value_info("potential/conv1/0"))
        onnx.save(network, tmp_path / "watched.onnx")
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "watched.onnx"), providers=["CPUExecutionProvider"])
        x = np.full((1, *SHAPE), 0.5, np.float32)
        potentials.append(session.run(["potential/conv1/0"], {"images": x})[0])
    moved = np.abs(potentials[0] - potentials[1]).max()
    assert 0 < moved < 2**-10 * np.abs(potentials[0]).max() * 27


def test_a_bundle_holds_every_precision_and_what_it_costs(precise: Bundle) -> None:
    variants = precise.manifest.variants
    assert list(variants) == list(PRECISIONS)
    assert set(variants["int8"].layers.values()) == {"fp32", "int8"}
    for precision, variant in variants.items():
        inputs, logits = precise.golden(precision)
        with OnnxRuntime(precise.variant(precision)) as network:
            np.testing.assert_allclose(network(inputs), logits, atol=1e-5)
        with open_predictor(precise, precision=precision) as predictor:
            assert (predictor(inputs).argmax(1) == precise.golden()[1].argmax(1)).all()
        assert variant.accuracy.n == variant.attacked.n == 100
        assert abs(variant.accuracy.share - variants["fp32"].accuracy.share) <= 0.05
    assert variants["fp32"].attacked.share < variants["fp32"].accuracy.share
    assert len({precise.variant(p).stat().st_size for p in PRECISIONS}) >= 3


def test_a_wrong_quantised_network_does_not_answer_its_golden_batch(precise: Bundle, tmp_path: Path) -> None:
    network = onnx.load(precise.variant("int8"))
    (scales,) = (i for i in network.graph.initializer if i.name == "conv3/scales")
    scales.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scales) * 1.3, scales.name))
    inputs, logits = precise.golden("int8")
    onnx.save(network, tmp_path / "model.onnx")
    with OnnxRuntime(tmp_path / "model.onnx") as broken:
        within = np.abs(broken(inputs) - logits).max(1) <= 1e-5
    assert within.mean() < 0.5  # what open_predictor refuses


def test_a_layer_that_int8_ruins_goes_back_to_float16(run_dir: Path, tmp_path: Path) -> None:
    """A huge weight for a channel that never fires changes nothing, but takes every int8 step of its layer."""
    found = load_checkpoint(run_dir / "best")
    weights = load_file(run_dir / "best" / found.weights)
    weights["body.0.norm.bias"][0] = -100.0
    weights["body.2.synapse.weight"][:, 0] = 50.0
    save_checkpoint(tmp_path / "run", found, weights)
    plain = export(tmp_path / "run", tmp_path / "plain", precisions=["int8"]).manifest.variants
    assert plain["fp32"].accuracy.share - plain["int8"].accuracy.share > 0.2
    bundle = export(tmp_path / "run", tmp_path / "bundle", precisions=["int8", "fp32", "int8"], max_drop=0.02)
    variants = bundle.manifest.variants
    assert list(variants) == ["fp32", "int8"]
    assert variants["int8"].layers == {**plain["int8"].layers, "conv2": "fp16"}
    assert set(plain["int8"].layers.values()) == {"fp32", "int8"}
    for kind in ("accuracy", "attacked"):
        assert getattr(variants["fp32"], kind).share - getattr(variants["int8"], kind).share <= 0.02
    with open_predictor(bundle, precision="int8"):
        pass


def test_a_budget_that_nothing_meets_writes_nothing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpdsgr_deploy.exporting.precision_loss.drop", lambda exact, found, classes: 0.5)
    with pytest.raises(EvaluationError, match=r"int8 loses 50.00% of accuracy even with every layer in fp16"):
        export(run_dir, tmp_path / "bundle", precisions=["int8"], max_drop=0.01)
    assert not (tmp_path / "bundle").exists()


def test_float16_that_overflows_is_refused_or_goes_back_to_float32(run_dir: Path, tmp_path: Path) -> None:
    """Weights beyond float16 for features that are always 0: 0 in float32, 0 times infinity in float16."""
    found = load_checkpoint(run_dir / "best")
    weights = load_file(run_dir / "best" / found.weights)
    weights["body.3.norm.bias"][0] = -100.0
    weights["readout.weight"][:, 0] = 1e6
    save_checkpoint(tmp_path / "run", found, weights)
    with pytest.raises(EvaluationError, match="fp16 overflows"):
        export(tmp_path / "run", tmp_path / "bundle", precisions=["fp16"])
    variants = export(tmp_path / "run", tmp_path / "bundle", precisions=["fp16"], max_drop=0.1).manifest.variants
    assert {layer for layer, precision in variants["fp16"].layers.items() if precision == "fp32"} == {"readout"}


def test_one_image_of_a_hundred_is_a_drop_of_exactly_one_hundredth() -> None:
    classes = np.arange(100) % 10
    exact = np.eye(10, dtype=np.float32)[classes]
    wrong = exact.copy()
    wrong[7] = exact[8]
    both = {"clean": exact, "attacked": exact}
    for kind in both:
        assert drop(both, {**both, kind: wrong}, classes) == 0.01
    assert drop({"clean": wrong}, {"clean": exact}, classes) == -0.01


def test_golden_rows_agree_and_have_the_widest_margins() -> None:
    torch_logits = np.array([[3, 0], [9, 0], [1, 0], [2, 0]], np.float32)
    onnx_logits = torch_logits + np.float32([[0], [1], [0], [0]])  # a spike flipped on the second image
    rounded = np.array([[3, 0], [9, 0], [1, 0], [2, 1.5]], np.float32)
    assert golden_rows(np.abs(torch_logits - onnx_logits).max(1) <= TOLERANCE, [torch_logits, rounded]).tolist() == [
        0,
        2,
        3,
    ]
    many = np.stack([np.arange(12), np.zeros(12)], 1).astype(np.float32)
    assert golden_rows(np.ones(len(many), bool), [many]).tolist() == list(range(4, 12))
    assert golden_rows(np.ones(3, bool), [many[:3, :1]]).tolist() == [0, 1, 2]  # a single label


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_network_without_products_has_an_empty_plan(precision: str) -> None:
    assert plan(ir.from_onnx_text("net (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"), precision) == {}


def test_bad_precisions_are_refused(
    run_dir: Path, run_without_data: Path, bundle: Bundle, precise: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="unknown precision 'int4'"):
        export(run_dir, tmp_path / "bundle", precisions=["int4"])
    with pytest.raises(InputError, match="add --precision or"):
        export(run_dir, tmp_path / "bundle", precisions=["fp32"], max_drop=0.01)
    with pytest.raises(InputError, match="no precision 'int8'; it has fp32"), open_predictor(bundle, precision="int8"):
        pass
    with pytest.raises(InputError, match="runs only fp32"), open_predictor(precise, "torch", "int8"):
        pass
    with pytest.raises(InputError, match="--max-drop needs the test images"):
        export(run_without_data, tmp_path / "bundle", precisions=["int8"], max_drop=0.01)


def test_rounding_is_symmetric_and_a_silent_channel_stays_silent() -> None:
    weights = torch.tensor([[-1.0, 1.0, 0.5], [0.0, 0.0, 0.0]]).numpy()
    values, scales = rounded_weights(weights, FORMATS["fp8"], np.dtype(np.float16))
    np.testing.assert_allclose(values.astype(np.float32)[0] * scales[0].astype(np.float32), weights[0], rtol=2e-3)
    assert not values[1].astype(np.float32).any()
