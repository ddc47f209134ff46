"""Files that cannot be adopted, and what adoption warns of."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from foreign_files import digits, file, quick
from onnx import numpy_helper

from mpdsgr_deploy.adoption import Preprocessing, adopt, read_classifier
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.validation.health.artefact import check_logits


def test_check_reports_node_by_node_and_writes_nothing(tmp_path: Path) -> None:
    words = ["adopt", str(file("norse-lif")), "--check", "--json"]
    found = json.loads(CliRunner().invoke(main, words).output)
    assert found["attackable"]
    assert found["time steps"] == 8
    assert {node["status"] for node in found["nodes"]} == {"faithful", "approximate"}
    network = onnx.load(file("norse-lif"))
    network.graph.node.extend([onnx.helper.make_node("Cos", ["logits"], ["cos"])])
    network.graph.output[0].name = "cos"
    onnx.save(network, tmp_path / "cos.onnx")
    done = CliRunner().invoke(main, ["adopt", str(tmp_path / "cos.onnx"), "--check"])
    assert done.exit_code == 2
    assert "unsupported" in done.output
    assert "cos (Cos) is an operator without a rule" in done.output
    assert list(tmp_path.iterdir()) == [tmp_path / "cos.onnx"]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (["Softmax logits q", "Clip q p"], r"remove node q \(Softmax\) and make its input 'logits' the output"),
        (["Exp logits e", "ReduceSum e s", "Div e s p"], "holds probabilities, not logits; export the values before"),
    ],
)
def test_probabilities_are_seen_by_their_sum(nodes: list[str], message: str, tmp_path: Path) -> None:
    network = onnx.load(file("snntorch-zero"))
    for op_type, *inputs, output in map(str.split, nodes):
        axes = ["rows"] if op_type == "ReduceSum" else []
        network.graph.node.append(onnx.helper.make_node(op_type, [*inputs, *axes], [output], name=output))
    network.graph.initializer.append(numpy_helper.from_array(np.array([1]), "rows"))
    network.graph.output[0].name = "p"
    onnx.save(network, tmp_path / "p.onnx")
    with pytest.raises(InputError, match=message):
        adopt(tmp_path / "p.onnx", digits(12), tmp_path / "no", recipe=quick())
    assert not (tmp_path / "no").exists()


def test_a_framework_that_answers_otherwise_is_an_invalid_evaluation(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32)
    with pytest.raises(EvaluationError, match="gives other logits than the framework it comes from"):
        adopt(file("norse-lif"), digits(12), tmp_path / "out", reference=logits, recipe=quick())
    assert not (tmp_path / "out").exists()


def test_wrong_pixels_are_seen_by_accuracy_at_chance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adopt(file("norse-lif"), digits(12), tmp_path / "out", preprocessing=Preprocessing(40, 41), recipe=quick())
    assert "no better than chance" in caplog.text


def test_outputs_that_count_spikes_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = onnx.load(file("snntorch-zero"))
    network.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "none"))
    network.graph.node.append(onnx.helper.make_node("Greater", ["logits", "none"], ["fired"]))
    network.graph.node.append(onnx.helper.make_node("Cast", ["fired"], ["counts"], to=onnx.TensorProto.FLOAT))
    network.graph.output[0].name = "counts"
    onnx.save(network, tmp_path / "counts.onnx")
    adopt(tmp_path / "counts.onnx", digits(60), tmp_path / "out", recipe=quick())
    assert "validate` will end INVALID (check 12)" in caplog.text


def changed(network: onnx.ModelProto, how: str) -> None:
    """Makes of a good network one that cannot be adopted."""
    graph = network.graph
    match how:
        case "probabilities":
            graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["p"]))
            graph.output[0].name = "p"
        case "two outputs":
            graph.output.append(onnx.helper.make_tensor_value_info("conv2d", 1, None))
        case "labels":
            graph.node.append(onnx.helper.make_node("ArgMax", ["logits"], ["label"], axis=1))
            graph.output[0].name, graph.output[0].type.tensor_type.elem_type = "label", onnx.TensorProto.INT64
        case "an integer input":
            graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
        case "a flat input":
            del graph.input[0].type.tensor_type.shape.dim[2:]
        case "two inputs":
            graph.input.append(onnx.helper.make_tensor_value_info("state", 1, ["batch", 4]))
        case "a custom operator":
            graph.node[1].domain = "my.own"
        case "an old opset":
            network.opset_import[0].version = 11
        case "external data" | "much external data":
            graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
            graph.initializer[0].dims[0] = 2**30 if how.startswith("much") else 1


BAD = {
    "probabilities": r"holds probabilities, not logits; remove node p \(Softmax\) and make its input 'logits'",
    "labels": "output 'label' is int64; export logits as float32",
    "two outputs": "has 2 outputs",
    "an integer input": "is uint8 with 4 axes",
    "a flat input": "with 2 axes and no batch of images",
    "two inputs": r"has 2 inputs \(images, state\)",
    "a custom operator": r"is a custom operator \(my.own",
    "an old opset": "has opset 11; export again with opset 13",
    "external data": "stores its weights in separate files; save everything in one",
    "much external data": "is larger than 2 GB",
    "a large file": "is larger than 2 GB",
    "no file": "is not an ONNX file",
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_bad_input_is_one_line_that_says_what_to_do(how: str, tmp_path: Path) -> None:
    network = onnx.load(file("snntorch-zero"))
    changed(network, how)
    if how != "no file":
        (tmp_path / "bad.onnx").write_bytes(network.SerializeToString())
    if how == "a large file":
        os.truncate(tmp_path / "bad.onnx", 2**31)  # sparse
    words = ["adopt", str(tmp_path / "bad.onnx"), "--images", "digits", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1, done.output
    with pytest.raises(InputError, match=BAD[how]):
        read_classifier(tmp_path / "bad.onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "a,b"], "10 logits and there are 2 labels"),
        (["--mean", "0.5"], "--mean and --std belong together"),
        (["--mean", "1,2", "--std", "1,1"], "takes 1 channels"),
        (["--range", "0-255"], "write 2 numbers with commas"),
        (["--range", "255,0"], "--range 255,0 is not a range of pixels"),
        (["--surrogate", "triangel"], "did you mean 'triangle'"),
        (["--surrogate", "triangle+averaged"], "exists only for attacks"),
        (["--surrogate", "straight-through"], "exists only for attacks"),
        (["--variant", "int8"], "write NAME=FILE"),
        (["--variant", "a=x.onnx", "--variant", "a=y.onnx"], "names a more than once"),
        (["--layout", "nhwc"], "shape"),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    words = ["adopt", str(file("snntorch-zero")), "--images", "digits", "--out", str(tmp_path / "out"), *options]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_logits_that_a_quantiser_rounded_are_no_counts() -> None:
    logits = (np.random.default_rng(0).normal(size=(60, 10)) * 20).round().astype(np.float32)
    assert check_logits(logits).failed
    assert not check_logits(logits, rounded_outputs=True).failed
    assert check_logits(logits.clip(0, 8), rounded_outputs=True).failed
