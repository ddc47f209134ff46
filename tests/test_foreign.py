"""Networks that other libraries trained: recognised, differentiated as their own autograd does, adopted as bundles.

The files under `foreign/` are written by `foreign/make.py`, which names the versions that made them.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from foreign.planted import hidden, missed, swapped, written
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from served import Served

from mpdsgr_deploy.adopt import Preprocessing, adopt, read_classifier, survey
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.data import Images, load_test, load_training
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.exporting import export_module, find_module
from mpdsgr_deploy.recipe import Data, Recipe
from mpdsgr_deploy.runtime import OnnxRuntime, open_predictor
from mpdsgr_deploy.runtime.remote import RemoteModel
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.validation.health.artefact import check_logits

FOREIGN = Path(__file__).parent / "foreign"
# The surrogate of each library as it was trained. Norse 1.1 divides by (|x| + 1)^2 whatever its alpha.
SURROGATES = {
    "spikingjelly-hard": "arctan:2",
    "spikingjelly-soft": "arctan:2",
    "spikingjelly-plif-maxpool": "arctan:2",
    "spikingjelly-detached": "arctan:2+detached",
    "snntorch-subtract": "arctan:2+detached",
    "snntorch-zero": "arctan:2+detached",
    "norse-lif": "superspike:1",
    "sinabs-lif": "exponential:0.25",
}
STEPS = {"norse-lif": 8}
HELD_OUT = ("spikingjelly-soft", "snntorch-subtract", "norse-lif", "sinabs-lif")  # one network of each library


def file(name: str) -> Path:
    return FOREIGN / f"{name}.onnx"


def record(name: str) -> dict[str, np.ndarray]:
    with np.load(FOREIGN / f"{name}.npz") as arrays:
        return dict(arrays)


def digits(count: int) -> Images:
    return load_test(Data(name="digits"))[:count]


@pytest.mark.parametrize("name", SURROGATES)
def test_gradients_are_those_of_the_librarys_own_autograd(name: str) -> None:
    recorded = record(name)
    with GraphAttacker(file(name), SURROGATES[name]) as attacker:
        found = attacker(recorded["images"], recorded["classes"])
    np.testing.assert_allclose(found.logits, recorded["logits"], atol=1e-5)
    expected = recorded["gradient"]
    np.testing.assert_allclose(found.gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    other = SURROGATES[name].removesuffix("+detached") + ("" if "+" in SURROGATES[name] else "+detached")
    with GraphAttacker(file(name), other) as attacker:
        unlike = attacker(recorded["images"], recorded["classes"]).gradient
    assert np.abs(unlike - expected).max() > 0.01 * np.abs(expected).max()  # attached is not passed off as detached


@pytest.mark.parametrize("name", SURROGATES)
def test_layers_and_time_steps_are_recognised(name: str) -> None:
    seen = survey(read_classifier(file(name)).network, SURROGATES[name])
    assert not seen.refused
    assert list(seen.layers.values()) == [STEPS.get(name, 4)] * 2
    assert seen.spikes == 2 * STEPS.get(name, 4)
    assert seen.counts()["approximate"] == seen.spikes
    assert seen.resets


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A SpikingJelly network as a bundle, by the command."""
    out = tmp_path_factory.mktemp("adopted") / "bundle"
    reference = out.parent / "logits.npz"
    with open_onnx(file("spikingjelly-soft")) as network:
        np.savez(reference, logits=network(digits(50).unit()))
    command = ["adopt", file("spikingjelly-soft"), "--images", "digits", "--surrogate", "arctan:2", "--limit", 50]
    options = ["--reference", reference, "--set", "attack.strong_steps=10", "--out", out]
    done = CliRunner().invoke(main, [str(word) for word in (*command, *options)])
    assert done.exit_code == 0, done.output
    assert "next: mpdsgr validate" in done.output
    return open_bundle(out)


def open_onnx(path: Path) -> OnnxRuntime:
    return OnnxRuntime(path)


def test_the_users_file_is_deployed_byte_for_byte(adopted: Bundle) -> None:
    assert adopted.variant("fp32").read_bytes() == file("spikingjelly-soft").read_bytes()
    manifest = adopted.manifest
    assert manifest.origin == "adopted"
    assert manifest.recipe.encoding.T == 4
    assert manifest.recipe.attack.also == ("strong-pgd-detached",)
    assert manifest.variants["fp32"].accuracy.share > 0.9
    assert manifest.reference.correct["worst"] <= manifest.reference.correct["strong-pgd-detached"]


def test_detached_resets_are_attacked_first_where_they_were_trained(tmp_path: Path) -> None:
    bundle = adopt(file("snntorch-zero"), digits(12), tmp_path / "out", surrogate="arctan:2+detached", recipe=quick())
    assert trained_surrogate(bundle.manifest.recipe) == "arctan:2+detached"
    assert bundle.manifest.recipe.attack.also == ("strong-pgd-attached",)
    assert bundle.manifest.reference.correct["worst"] <= bundle.manifest.reference.correct["strong-pgd-attached"]


@pytest.mark.parametrize("command", ["inspect", "predict", "validate", "deploy", "build"])
def test_every_command_takes_the_bundle(adopted: Bundle, command: str, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", digits(5).unit())
    (tmp_path / "gate.toml").write_text('tier = "commit"\nimages = 50\nmax_drop = 0.2\n')
    bundle = str(adopted.path)
    words = {
        "inspect": ["inspect", bundle],
        "predict": ["predict", bundle, str(tmp_path / "images.npy"), "--out", str(tmp_path / "out.csv")],
        "validate": ["validate", bundle, "--gate", str(tmp_path / "gate.toml"), "--report", str(tmp_path / "report")],
        "deploy": ["deploy", "triton", bundle, "--out", str(tmp_path / "triton")],
        "build": ["build", str(copytree(bundle, tmp_path / "built")), "--backend", "onnxruntime-cpu"],
    }[command]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "REG" not in done.output


def test_a_server_answers_as_the_bundle(adopted: Bundle) -> None:
    x = digits(5).unit()
    with Served(adopted.path) as server, open_predictor(adopted) as predictor:
        address = f"http://127.0.0.1:{server.port}/v2/models/{adopted.path.name}"
        with RemoteModel(address, adopted.manifest.input_shape, 10) as served:
            np.testing.assert_allclose(served(x), predictor(x), atol=1e-5)


def test_the_torch_backend_says_that_there_are_no_weights(adopted: Bundle) -> None:
    with pytest.raises(InputError, match="no torch weights"), open_predictor(adopted, "torch"):
        pass


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


def test_what_stands_in_front_of_a_network_is_put_there(tmp_path: Path) -> None:
    """A network of pixels from 0 to 255, one that normalises, and one of other axes answer as the plain one."""
    x = digits(6).unit()
    with open_onnx(file("snntorch-zero")) as network:
        plain = network(x)
    for before, undo in (
        (Preprocessing(0, 255), ("Div", np.array(255, np.float32))),
        (Preprocessing(mean=(0.3,), std=(0.2,)), ("Mul", np.array(0.2, np.float32))),
    ):
        network = onnx.load(file("snntorch-zero"))
        network.graph.node[0].input[0] = "own"
        shift = np.array(before.mean or 0, np.float32).reshape(-1)
        network.graph.initializer.extend(
            [numpy_helper.from_array(undo[1], "by"), numpy_helper.from_array(shift, "shift")]
        )
        nodes = [onnx.helper.make_node(undo[0], ["images", "by"], ["scaled"])]
        nodes.append(onnx.helper.make_node("Add", ["scaled", "shift"], ["own"]))
        rest = list(network.graph.node)
        del network.graph.node[:]
        network.graph.node.extend([*nodes, *rest])
        for node in network.graph.node[2:]:
            node.input[:] = ["own" if name == "images" else name for name in node.input]
        onnx.save(network, tmp_path / "scaled.onnx")
        made = read_classifier(tmp_path / "scaled.onnx", before)
        assert not made.unchanged
        assert list(made.network.graph.node)[-len(network.graph.node) :] == list(network.graph.node)
        with OnnxRuntime(made.network, source="made") as answered:
            np.testing.assert_allclose(answered(x), plain, atol=1e-4)


class Fixed(torch.nn.Module):
    """What exporters write down at a fixed batch: initial states, expanded values, time folded into the batch."""

    def __init__(self, *, mixes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.mixes = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(144, 10), mixes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, spikes = torch.full((len(x), 4, 6, 6), 0.1), []
        for _ in range(3):
            u = u * 0.5 + self.conv(x)
            spikes.append((u > 0.2).float())
            u = u - 0.2 * spikes[-1]
        outputs = self.head(torch.stack(spikes).flatten(0, 1).reshape(3 * len(x), -1)).reshape(3, len(x), 10).mean(0)
        return outputs - outputs.mean(0) if self.mixes else outputs


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_freed(batch: int, tmp_path: Path) -> None:
    network, x = Fixed().eval(), torch.from_numpy(digits(12).unit())
    exported(network, x[:batch], tmp_path / "fixed.onnx")
    bundle = adopt(tmp_path / "fixed.onnx", digits(12), tmp_path / "bundle", recipe=quick())
    assert bundle.manifest.provenance["adopted"]["batch fixed at export"] == batch
    with open_predictor(bundle) as predictor, torch.no_grad():
        np.testing.assert_allclose(predictor(x.numpy()), network(x), atol=1e-5)


def test_a_network_that_is_bound_to_its_batch_is_refused(tmp_path: Path) -> None:
    exported(Fixed(mixes=True).eval(), torch.from_numpy(digits(4).unit()), tmp_path / "mixed.onnx")
    with pytest.raises(InputError, match=r"in another batch|unknown sizes"):
        adopt(tmp_path / "mixed.onnx", digits(12), tmp_path / "no", recipe=quick())
    assert not (tmp_path / "no").exists()


def exported(network: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (x,), dynamo=True, input_names=["images"], verbose=False)
    program.save(path)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (["Softmax logits q", "Clip q p"], r"cut node q \(Softmax\) off and make its input 'logits' the output"),
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


def quick() -> Recipe:
    return Recipe.model_validate({"attack": {"strong_steps": 2, "steps": 2, "step": 0.02}, "data": {"name": "digits"}})


def test_a_framework_that_answers_otherwise_is_an_invalid_evaluation(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32)
    with pytest.raises(EvaluationError, match="does not answer as the framework it comes from"):
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
    "probabilities": r"holds probabilities, not logits; cut node p \(Softmax\) off and make its input 'logits'",
    "labels": "output 'label' is int64; export logits as float32",
    "two outputs": "has 2 outputs",
    "an integer input": "is uint8 with 4 axes",
    "a flat input": "with 2 axes and no batch of images",
    "two inputs": r"has 2 inputs \(images, state\)",
    "a custom operator": r"is a custom operator \(my.own",
    "an old opset": "has opset 11; export again with opset 13",
    "external data": "keeps its weights in other files; save it as one",
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
        (["--range", "0-255"], "write numbers with commas"),
        (["--range", "255,0"], "cannot take pixels from 255 to 0"),
        (["--surrogate", "triangel"], "did you mean 'triangle'"),
        (["--surrogate", "triangle+averaged"], "is an attacker's"),
        (["--surrogate", "straight-through"], "is an attacker's"),
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


class Net(torch.nn.Module):
    """Three spiking layers over three steps, for `export_module`."""

    def __init__(self, *, leaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.between = torch.nn.Conv2d(1, 6, 3), torch.nn.Linear(216, 20)
        self.head, self.leaks, self.kept = torch.nn.Linear(20, 10), leaks, torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.kept if self.leaks else torch.zeros(())
        v, outputs = torch.zeros(()), []
        for _ in range(3):
            u = u * 0.5 + self.conv(x)
            spikes = (u > 0.2).float()
            u = u - 0.2 * spikes
            v = v * 0.5 + self.between(spikes.flatten(1))
            fired = (v > 0.1).float()
            v = v - 0.1 * fired
            outputs.append(self.head(fired))
        if self.leaks:
            self.kept = u.mean()
        return torch.stack(outputs).mean(0)


def test_a_module_is_exported_with_torch_as_its_reference(tmp_path: Path) -> None:
    module = Net()
    with torch.no_grad():
        logits = module(torch.from_numpy(digits(12).unit())).numpy()
    bundle = export_module(module, digits(12), tmp_path / "out", precisions=("int8",), recipe=quick())
    assert bundle.manifest.origin == "module"
    assert list(bundle.manifest.variants) == ["fp32", "int8"]
    np.testing.assert_allclose(bundle.reference().logits["fp32"], logits, atol=1e-5)
    operators = {node.op_type for node in onnx.load(bundle.variant("int8")).graph.node}
    assert "QuantizeLinear" in operators
    with open_predictor(bundle, precision="int8") as predictor:
        assert np.abs(predictor(digits(12).unit()) - logits).max() < 0.5


def test_a_state_that_is_left_over_is_found(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="a state is left over from one call to the next"):
        export_module(Net(leaks=True), digits(200), tmp_path / "out")


def test_a_module_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_net.py").write_text("from test_foreign import Net\ndef build(): return Net()\nword = str\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert isinstance(find_module("own_net:build"), torch.nn.Module)
    for name, message in (
        ("own_net:none", "AttributeError"),
        ("own_net:word", "gives a str"),
        ("no_net:x", "ModuleNot"),
    ):
        with pytest.raises(InputError, match=message):
            find_module(name)
    done = CliRunner().invoke(main, ["export", "own_net:build", "--out", "out"])
    assert done.exit_code == 2
    assert "give --data" in done.output
    words = ["export", "own_net:build", "--data", "digits", "--limit", "3", "--precision", "int8", "--out", "out"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert list(open_bundle(Path("out")).manifest.variants) == ["fp32", "int8"]


def test_a_comparison_that_nobody_follows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between images and logits is found apart from how jumps are, so that nothing passes for constant."""
    network = written("a comparison hidden behind a Cast chain", tmp_path)
    assert not survey(read_classifier(network).network, "arctan:2").refused
    hidden(monkeypatch)
    out = tmp_path / "bundle"
    words = ["adopt", network, "--images", "digits", "--limit", 50, "--surrogate", "arctan:2", "--out", out]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 2
    assert "_to_copy/whole (Cast) decides by what depends on the images" in done.output
    assert not out.exists()


@pytest.mark.parametrize("plant", [missed, swapped])
def test_a_faulty_derivation_does_not_pass_the_gate(
    plant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted when the bundle is made and when it is validated, so that no comparison of files shows it."""
    plant(monkeypatch)
    out, gate = tmp_path / "bundle", tmp_path / "gate.toml"
    gate.write_text('tier = "commit"\nimages = 50\nmax_drop = 0.2\n')
    words = ["adopt", file("spikingjelly-soft"), "--images", "digits", "--surrogate", "arctan:2", "--limit", 50]
    words += ["--set", "attack.strong_steps=10"]
    done = CliRunner().invoke(main, [str(word) for word in (*words, "--out", out)])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["validate", str(out), "--gate", str(gate), "--report", str(tmp_path / "report")])
    assert done.exit_code in (1, 3), done.output


def test_an_ordinary_network_that_is_certain_of_its_answers_is_gated(tmp_path: Path) -> None:
    """Where 1 - p rounds to 0 the cross-entropy has no gradient in float32: the margin shows that attacks see one."""
    draw, images = np.random.default_rng(0), load_training(Data(name="digits"))[0]
    features = draw.normal(0, 0.5, (64, 128)).astype(np.float32)
    hidden = np.maximum(images.unit().reshape(len(images), -1) @ features, 0)
    targets = np.eye(10, dtype=np.float32)[images.classes] - 0.1
    head = 60 * np.linalg.solve(hidden.T @ hidden + 10 * np.eye(128), hidden.T @ targets).astype(np.float32)
    body = "<ir_version: 10, opset_import: ['': 21]> ann (float[b, 1, 8, 8] x) => (float[b, 10] logits) "
    body += "{ f = Flatten (x) h = Gemm (f, features) r = Relu (h) logits = Gemm (r, head) }"
    network = onnx.parser.parse_model(body.replace("'", '"'))
    network.graph.initializer.extend(
        [numpy_helper.from_array(features, "features"), numpy_helper.from_array(head.astype(np.float32), "head")]
    )
    onnx.save(network, tmp_path / "ann.onnx")
    bundle = adopt(tmp_path / "ann.onnx", digits(60), tmp_path / "bundle", recipe=quick())
    (tmp_path / "gate.toml").write_text('tier = "commit"\nimages = 60\nmax_drop = 0.2\n')
    words = ["validate", bundle.path, "--gate", tmp_path / "gate.toml", "--report", tmp_path / "report"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "adopted as an ONNX file" in (tmp_path / "report" / "summary.md").read_text()


class Calibration(CalibrationDataReader):
    """Images for onnxruntime's quantiser."""

    def __init__(self, images: np.ndarray) -> None:
        self.batches = iter([{"images": images}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def test_what_another_quantiser_wrote_is_gated_against_float32(tmp_path: Path) -> None:
    """It fuses and rounds as it likes, so its file is not compared node by node, but image by image."""
    quantised, out, gate = tmp_path / "int8.onnx", tmp_path / "bundle", tmp_path / "gate.toml"
    quantize_static(file("snntorch-subtract"), quantised, Calibration(digits(100).unit()))
    words = ["adopt", file("snntorch-subtract"), "--images", "digits", "--surrogate", "arctan:2", "--limit", 50]
    words += ["--set", "attack.strong_steps=10"]
    done = CliRunner().invoke(main, [str(w) for w in (*words, "--variant", f"int8={quantised}", "--out", out)])
    assert done.exit_code == 0, done.output
    gate.write_text('tier = "commit"\nimages = 50\nmax_drop = 0.2\n')
    words = ["validate", out, "--precision", "int8", "--gate", gate, "--report", tmp_path / "report"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "transfer fp32" in done.output


def test_logits_that_a_quantiser_rounded_are_no_counts() -> None:
    logits = (np.random.default_rng(0).normal(size=(60, 10)) * 20).round().astype(np.float32)
    assert check_logits(logits).failed
    assert not check_logits(logits, rounded_outputs=True).failed
    assert check_logits(logits.clip(0, 8), rounded_outputs=True).failed
