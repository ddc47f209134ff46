"""Networks that other libraries trained: recognised, differentiated as their own autograd does, adopted as bundles.

The files under `foreign/` are written by `foreign/make.py`, which names the versions that made them.
"""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from foreign.planted import hidden, missed, swapped, written
from foreign_files import FOREIGN, digits, file, open_onnx, quick
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from served import Served

from mpdsgr_deploy.adoption import Preprocessing, adopt, read_classifier, survey
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.runtime import OnnxRuntime, open_predictor
from mpdsgr_deploy.runtime.remote import RemoteModel
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.training.training_state import find_weights

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


def record(name: str) -> dict[str, np.ndarray]:
    with np.load(FOREIGN / f"{name}.npz") as arrays:
        return dict(arrays)


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


def test_training_has_nothing_to_start_from_in_it(adopted: Bundle) -> None:
    with pytest.raises(InputError, match=r"holds no torch weights.*give --init the torch module"):
        find_weights(adopted.path)


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


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (Preprocessing(std=(2.0,)), lambda x: x / 2),
        (Preprocessing(0, 2, mean=(0.5,)), lambda x: 2 * x - np.float32(0.5)),
    ],
)
def test_a_mean_or_a_deviation_alone_is_applied(
    before: Preprocessing, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    x = digits(6).unit() / 4 + np.float32(0.25)  # so that the network's input stays in [0, 1]
    np.testing.assert_array_equal(before.applied(x), expected(x))
    with open_onnx(file("snntorch-zero")) as plain:
        logits = plain(expected(x))
    with OnnxRuntime(read_classifier(file("snntorch-zero"), before).network, source="made") as made:
        np.testing.assert_allclose(made(x), logits, atol=1e-4)


def test_a_comparison_that_nobody_follows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between images and logits is found apart from how jumps are, so that nothing passes for constant."""
    network = written("a comparison hidden behind a Cast chain", tmp_path)
    assert not survey(read_classifier(network).network, "arctan:2").refused
    hidden(monkeypatch)
    out = tmp_path / "bundle"
    words = ["adopt", network, "--images", "digits", "--limit", 50, "--surrogate", "arctan:2", "--out", out]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 2
    assert "_to_copy/whole (Cast) compares values that depend on the images" in done.output
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
    words += ["--set", "attack.strong_steps=4"]
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
