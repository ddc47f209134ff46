"""What OpenVINO is given computes the same as the file, and rounds nothing."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime, open_predictor
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.openvino import OpenVino, chunks
from mpdsgr_deploy.runtime.openvino_graph import rewrite

BUNDLES = Path(__file__).parent.parent / "export" / "bundles"


@pytest.mark.parametrize("largest", [1, 3, 8, 32])
def test_a_batch_is_cut_into_few_sizes(largest: int) -> None:
    allowed = {largest, *(2**k for k in range(6) if 2**k <= largest)}
    for batch in range(1, 71):
        parts = list(chunks(batch, largest))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(batch))
        assert {part.stop - part.start for part in parts} <= allowed


def quantised(path: Path) -> np.ndarray:
    """Spikes [x >= 1/2] through an int8 convolution with a float bias, summed. Returns its weights [2, 1, 2, 2].

    Every number is a multiple of a power of two, so that any order of summation gives the same float32.
    """
    weights = np.random.default_rng(0).integers(-127, 128, (2, 1, 2, 2)).astype(np.int8)
    constants = {
        "half": np.float32(0.5),
        "one": np.float32(1),
        "zero": np.int8(0),
        "weights": weights,
        "scales": np.array([0.25, 2], np.float32),
        "zeros": np.zeros(2, np.int8),
        "bias": np.array([0.5, -3], np.float32),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("GreaterOrEqual", ["images", "half"], ["fires"]),
        helper.make_node("Cast", ["fires"], ["spikes"], to=onnx.TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["spikes", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weights", "scales", "zeros"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w", "bias"], ["y"]),
        helper.make_node("ReduceSum", ["y", "axes"], ["logits"], keepdims=0),
    ]
    write(path, nodes, constants)
    return weights * constants["scales"].reshape(2, 1, 1, 1)


def write(
    path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.generic | np.ndarray], opset: int = 21
) -> None:
    """A network of images [B, 1, 8, 8]."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def test_int8_is_exact(tmp_path: Path, images: np.ndarray) -> None:
    weights = quantised(tmp_path / "model.onnx")
    x = (images >= 0.5).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=(2, 3))
    sums = np.einsum("bihwkl,oikl->bohw", windows, weights) + np.array([0.5, -3]).reshape(2, 1, 1)
    with OpenVino(tmp_path / "model.onnx") as predictor:
        assert np.array_equal(predictor(images), sums.sum((2, 3)).astype(np.float32))


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar10-clean"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_openvino_is_given_answers_as_the_file_to_the_bit(name: str, precision: str, tmp_path: Path) -> None:
    bundle = open_bundle(BUNDLES / name)
    x = bundle.golden()[0]
    network = rewrite(onnx.load(bundle.variant(precision)))
    onnx.save(network, tmp_path / "rewritten.onnx")
    makers = {output: node.op_type for node in network.graph.node for output in node.output}
    received = {
        kind: {makers[node.input[0]] for node in network.graph.node if node.op_type == kind}
        for kind in ("Split", "AveragePool")
    }
    # an encoding that draws noise gives each time step its own first convolution, which int8 leaves in float32, and has
    # no normalisation
    drawn = bool(bundle.manifest.noise)
    if precision == "int8":
        assert received["Split"] == ({"Reshape", "Conv"} if drawn else {"Reshape"})
        assert "DequantizeLinear" in received["AveragePool"]
    else:
        assert received == {"Split": {"Conv"}, "AveragePool": {"Concat"}}
    assert sum(kind == "Sub" for kind in makers.values()) == (0 if drawn else 1)  # of the normalisation; resets choose
    noise = NoiseSource(bundle.manifest.noise)
    with (
        OnnxRuntime(bundle.variant(precision), noise=noise) as before,
        OnnxRuntime(tmp_path / "rewritten.onnx", noise=noise) as after,
    ):
        assert np.array_equal(before(x), after(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpdsgr_deploy.runtime.openvino.rewrite", lambda network: network)
        plain = OpenVino(bundle.variant(precision), noise=noise)
    with plain, OpenVino(bundle.variant(precision), noise=noise) as rewritten:
        assert np.array_equal(plain(x), rewritten(x))


def test_activations_become_unsigned_and_weights_do_not(tmp_path: Path, images: np.ndarray) -> None:
    quantised(tmp_path / "int8.onnx")
    changed = rewrite(onnx.load(tmp_path / "int8.onnx"))
    onnx.save(changed, tmp_path / "uint8.onnx")
    types = {tensor.name: tensor.data_type for tensor in changed.graph.initializer}
    signed = onnx.TensorProto.INT8
    assert (types["zero"], types["weights"], types["zeros"]) == (onnx.TensorProto.UINT8, signed, signed)
    with OnnxRuntime(tmp_path / "int8.onnx") as before, OnnxRuntime(tmp_path / "uint8.onnx") as after:
        assert np.array_equal(before(images), after(images))


def test_openvino_rounds_nothing_and_uses_the_threads_it_is_given(bundle: Bundle, images: np.ndarray) -> None:
    with OpenVino(bundle.variant("fp32"), settings=RuntimeSettings(threads=1, chunk=4)) as predictor:
        predictor(images[:7])
        assert set(predictor._requests) == {4, 2, 1}
        compiled = predictor._requests[4].get_compiled_model()
        assert "float32" in str(compiled.get_property("INFERENCE_PRECISION_HINT"))
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled.get_property("NUM_STREAMS") == 1


def test_openvino_says_that_it_does_not_round_to_float16(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    small = open_bundle(shipped("export") / "doctor" / "bundle")
    for precision in ("fp32", "int8", "fp16"):
        assert "float16" not in caplog.text
        with open_predictor(small, "openvino", precision):
            pass
    assert "openvino computes float16 networks in float32" in caplog.text


def test_what_openvino_refuses_is_named_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "own.onnx", [helper.make_node("Frobnicate", ["images"], ["logits"], domain="own")], {})
    (tmp_path / "noise.onnx").write_bytes(b"not onnx")
    for name, expected in (("own.onnx", r"own\.Frobnicate"), ("noise.onnx", "cannot load")):
        with pytest.raises(InputError, match=expected) as error:
            OpenVino(tmp_path / name)
        assert "\n" not in str(error.value)
