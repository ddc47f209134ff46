"""A Triton model repository: what is in it, what is refused, and a real tritonserver that loads it as it is."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.http
from conftest import assert_input_error, mpdsgr_here
from google.protobuf import text_format
from triton_server import Triton, environment, tritonserver
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime, open_predictor
from mpdsgr_deploy.serving.deploy.triton import SUMS, write_repository
from mpdsgr_deploy.serving.deploy.triton_config import CONFIG, tensors
from mpdsgr_deploy.serving.source import choose_models

CLIENTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
PRECISIONS = ("fp32", "fp16", "int8", "fp8")


@pytest.fixture(scope="module")
def repository(precise: Bundle, stochastic: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command: every precision of one bundle, and the network that draws noise."""
    out = tmp_path_factory.mktemp("deployed") / "repository"
    write_repository(choose_models([*(f"{precise.path}@{name}" for name in PRECISIONS), str(stochastic.path)]), out)
    return out


@pytest.fixture(scope="module")
def triton(repository: Path, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    assert pytestconfig.cache is not None
    env = environment(pytestconfig.cache.mkdir("triton"))
    with tritonserver(env, repository, tmp_path_factory.mktemp("triton") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def images(precise: Bundle) -> np.ndarray:
    return load_test(precise.manifest.recipe.data)[:128].unit()


def ask(triton: Triton, protocol: str, model: str, feeds: dict[str, np.ndarray], classes: int = 0) -> np.ndarray:
    """The logits, or the best classes as strings, that the stock client gets."""
    library = CLIENTS[protocol]
    inputs = [library.InferInput(name, x.shape, "FP32") for name, x in feeds.items()]
    for tensor, x in zip(inputs, feeds.values(), strict=True):
        tensor.set_data_from_numpy(x)
    with library.InferenceServerClient(getattr(triton, protocol)) as client:
        wanted = library.InferRequestedOutput("logits", class_count=classes)
        return client.infer(model, inputs, outputs=[wanted]).as_numpy("logits")


@pytest.mark.parametrize("protocol", CLIENTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_triton_answers_as_the_predictor_here(
    triton: Triton, precise: Bundle, images: np.ndarray, precision: str, protocol: str
) -> None:
    name = "precise" if precision == "fp32" else f"precise-{precision}"
    with open_predictor(precise, precision=precision) as predictor:
        expected = predictor(images)
    for batch in (1, 7, 128):
        logits = ask(triton, protocol, name, {"images": images[:batch]})
        np.testing.assert_allclose(logits, expected[:batch], atol=1e-5)


def test_triton_classifies_with_our_labels(triton: Triton, precise: Bundle, images: np.ndarray) -> None:
    with open_predictor(precise, precision="int8") as predictor:
        logits = predictor(images[:5])
    labels = precise.manifest.labels
    best = np.argsort(-logits, axis=1, kind="stable")[:, :3]
    found = ask(triton, "http", "precise-int8", {"images": images[:5]}, classes=3)
    assert found.shape == (5, 3)
    for row, answers in enumerate(found):
        values, indices, names = zip(*(answer.decode().split(":", 2) for answer in answers), strict=True)
        np.testing.assert_allclose(np.array(values, np.float32), logits[row, best[row]], atol=1e-5)
        assert list(names) == [labels[int(k)] for k in indices]
        assert int(indices[0]) == best[row, 0]


def test_triton_takes_the_noise_of_a_stochastic_network(triton: Triton, stochastic: Bundle, images: np.ndarray) -> None:
    x = images[:9]
    with open_predictor(stochastic) as predictor:
        expected = predictor(x)
    noise = NoiseSource(stochastic.manifest.noise, stochastic.manifest.recipe.validation.seed)
    np.testing.assert_allclose(ask(triton, "grpc", "noisy", {"images": x, **noise(x)}), expected, atol=1e-5)


def test_triton_says_what_was_written_and_keeps_its_bounds(triton: Triton, repository: Path) -> None:
    with tritonclient.http.InferenceServerClient(triton.http) as client:
        config = client.get_model_config("precise-int8")
        statistics = client.get_inference_statistics("precise-int8")["model_stats"][0]
    assert config["parameters"]["precision"] == {"string_value": "int8"}
    assert [sample["batch_size"] for sample in config["model_warmup"]] == [1]
    assert statistics["name"] == "precise-int8"
    with pytest.raises(InferenceServerException, match="batch-size must be <= 128"):
        ask(triton, "http", "precise-int8", {"images": np.zeros((129, 1, 8, 8), np.float32)})
    with pytest.raises(InferenceServerException, match="unexpected shape"):
        ask(triton, "http", "precise-int8", {"images": np.zeros((1, 1, 8, 9), np.float32)})
    sums = subprocess.run(["sha256sum", "-c", SUMS], cwd=repository, capture_output=True, text=True, check=False)
    assert sums.returncode == 0, sums.stdout + sums.stderr  # the server loaded it unmodified


def test_what_the_command_writes_and_says(precise: Bundle, stochastic: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    done = mpdsgr_here("deploy", "triton", precise.path, stochastic.path, "--out", out)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["precise: fp32, ONNX, batches up to 128", "noisy: fp32, ONNX, batches up to 128"]
    assert lines[2] == "  clients must also send the tensor uniform_0, FP32 [B, 3, 1, 8, 8], drawn from U[0, 1)"
    behind = 2 + len(stochastic.manifest.noise)  # a line for each of its inputs
    assert f"-v {out}:/models:ro" in lines[behind]
    done = mpdsgr_here("deploy", "triton", f"{precise.path}@int8", "--gpus", 2, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert model == {"name": "precise-int8", "precision": "int8", "largest": 128, "engines": {}, "noise": []}
    assert sorted(p.name for p in out.iterdir()) == [SUMS, "precise-int8"]  # what was there before is gone
    config = text_format.Parse((out / "precise-int8" / CONFIG).read_text(), model_config_pb2.ModelConfig())
    assert [config.instance_group[0].kind, *config.instance_group[0].gpus] == [
        model_config_pb2.ModelInstanceGroup.KIND_GPU,
        0,
        1,
    ]
    assert config.dynamic_batching.ByteSize() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_no_image_gets_no_valid_answer(precise: Bundle, repository: Path, precision: str) -> None:
    """Row by row: NaN for an image that `mpdsgr serve` refuses, and for all others the network's own logits."""
    name = "precise" if precision == "fp32" else f"precise-{precision}"
    x = np.random.default_rng(0).random((6, 1, 8, 8), np.float32)
    spoilt = x.copy()
    spoilt[1] *= 255
    spoilt[2, 0, 3, 3] = np.nan
    spoilt[3, 0, 0, 0], spoilt[4, 0, 7, 7] = -1e-6, 1 + 1e-6
    with (
        open_predictor(precise, precision=precision) as plain,
        OnnxRuntime(repository / name / "1" / "model.onnx") as network,
    ):
        session = network._session({"images": spoilt}, ["logits"])[0]
        assert np.isnan(session[1:5]).all()
        np.testing.assert_array_equal(network(x), plain(x))
        np.testing.assert_array_equal(session[[0, 5]], network(x)[[0, 5]])


def test_a_gpu_gets_float16_as_exported_and_a_cpu_with_its_roundings_written_down(
    precise: Bundle, tmp_path: Path
) -> None:
    models = choose_models([f"{precise.path}@fp16"])
    write_repository(models, tmp_path / "gpu", gpus=1)
    exported = onnx.load(precise.variant("fp16"))
    on_gpu = onnx.load(tmp_path / "gpu" / "precise-fp16" / "1" / "model.onnx")
    assert len(on_gpu.graph.node) == len(exported.graph.node) + 8  # the check of values
    weights = {tensor.name: tensor for tensor in on_gpu.graph.initializer}
    assert all(weights[tensor.name] == tensor for tensor in exported.graph.initializer)
    write_repository(models, tmp_path / "cpu")
    kinds = {i.data_type for i in onnx.load(tmp_path / "cpu" / "precise-fp16" / "1" / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 not in kinds


def test_a_network_with_a_fixed_batch_or_an_open_dimension_is_refused(repository: Path) -> None:
    network = onnx.load(repository / "precise-int8" / "1" / "model.onnx")
    dims = network.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value = 128
    with pytest.raises(InputError, match=r"images of the network is FLOAT \[128, 1, 8, 8\]"):
        tensors(network)
    dims[0].dim_param, dims[3].dim_param = "batch", "width"
    with pytest.raises(InputError, match=r"images of the network is FLOAT \[0, 1, 8, 0\]"):
        tensors(network)


def test_only_our_own_unchanged_files_are_replaced(precise: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    command = ("deploy", "triton", precise.path, "--out", out)
    assert_input_error(mpdsgr_here(*command), "not a Triton model repository of mpdsgr")
    (out / "notes.md").unlink()
    assert mpdsgr_here(*command).returncode == 0
    (out / "precise" / "notes.md").write_text("mine")
    assert_input_error(mpdsgr_here(*command), "holds precise/notes.md, which this command did not write")
    (out / "precise" / "notes.md").unlink()
    text = (out / "precise" / CONFIG).read_text()
    (out / "precise" / CONFIG).write_text(text.replace("128", "32"))
    assert_input_error(mpdsgr_here(*command), "config.pbtxt has been changed since")
    (out / "precise" / CONFIG).write_text(text)
    assert mpdsgr_here(*command).returncode == 0


def test_a_failure_leaves_the_old_repository(precise: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    models = choose_models([str(precise.path), f"{precise.path}@int8"])
    write_repository(models[:1], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    bundle = shutil.copytree(precise.path, tmp_path / "short")
    broken = choose_models([str(bundle)])
    (bundle / "model.fp32.onnx").unlink()  # after the bundle was opened and verified
    with pytest.raises(InputError, match=r"was not written: .*model\.fp32\.onnx.*Triton model repository is unchanged"):
        write_repository([*models, *broken], out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "short"]


def test_wrong_choices_are_one_line(precise: Bundle, tmp_path: Path) -> None:
    def deploy(*arguments: object) -> subprocess.CompletedProcess[str]:
        return mpdsgr_here("deploy", "triton", *arguments, "--out", tmp_path / "out")

    twin = shutil.copytree(precise.path, tmp_path / "twin" / "precise")
    odd = shutil.copytree(precise.path, tmp_path / "my net")
    assert_input_error(deploy(precise.path, twin), "two models would be called 'precise'", "write NAME=BUNDLE")
    assert_input_error(deploy(odd), "'my net' is not a valid model name", "write NAME=")
    assert_input_error(deploy(f"{precise.path}@int4"), "no precision 'int4'", "int8")
    assert_input_error(deploy(precise.path, "--backend", "tensorrt-rtx"), "unknown backend", "did you mean 'tensorrt'?")
    assert_input_error(deploy(tmp_path), "is not a bundle")
    assert not (tmp_path / "out").exists()
