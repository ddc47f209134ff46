"""Every backend answers as the torch model does, with settings measured on this machine where there are any."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import assert_input_error, mpdsgr
from onnx import helper, numpy_helper

from mpdsgr_deploy.bundle import Bundle, Manifest, open_bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime, open_predictor, tuning
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings, machine, prepared, prepared_settings
from mpdsgr_deploy.runtime.openvino import OpenVino, chunks
from mpdsgr_deploy.runtime.openvino_graph import rewrite
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.runtime.tuning import measured_at_start, tune

BUNDLES = Path(__file__).parent.parent / "export" / "bundles"
TUNED = ("openvino", "onnxruntime-cpu")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")))


@pytest.fixture(scope="module")
def images(bundle: Bundle) -> np.ndarray:
    return load_test(bundle.manifest.recipe.data)[:40].unit()


@pytest.mark.parametrize("backend", TUNED)
@pytest.mark.parametrize("settings", [RuntimeSettings(), RuntimeSettings(threads=1, chunk=3)])
def test_parity_with_torch_in_batches_of_every_kind(
    copy: Bundle, images: np.ndarray, backend: str, settings: RuntimeSettings
) -> None:
    expected = TorchModel.from_bundle(copy)(images)
    tuned = copy.add(prepared(copy, backend, "fp32", settings))
    with open_predictor(tuned, backend) as predictor:
        for batch in (1, 2, 3, 7, 8, 9, 13, 40):
            parity = compare(expected[:batch], predictor(images[:batch]))
            assert parity.labels_differ == 0
            assert parity.max_abs <= 1e-5, parity
        assert compare(expected[::2], predictor(images[::2])).holds  # not contiguous in memory


@pytest.mark.parametrize("backend", TUNED)
def test_outputs_are_fresh_and_threads_may_share_a_predictor(bundle: Bundle, images: np.ndarray, backend: str) -> None:
    with open_predictor(bundle, backend) as predictor:
        first = predictor(images)
        kept = first.copy()
        predictor(images[::-1].copy())
        assert np.array_equal(first, kept)
        first[:] = 0
        batches = [images[i : i + 7] for i in range(20)]
        alone = [predictor(batch) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(predictor, batches))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


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


@pytest.mark.parametrize("backend", TUNED)
def test_tuned_settings_are_used_on_this_machine_only(copy: Bundle, backend: str) -> None:
    tuned, record = tune(backend, copy, "fp32")
    assert record.machine == machine(backend)
    found = prepared_settings(open_bundle(tuned.path), backend, "fp32")
    assert found.threads is not None
    assert found.chunk in tuning.CHUNKS
    assert set(found.milliseconds) == {"1", "8", "32"}
    assert min(found.milliseconds.values()) > 0
    with open_predictor(tuned, backend) as predictor:
        assert predictor._chunk == found.chunk

    for other in ({"machine": {**record.machine, "cores": "1024"}}, {"model_sha256": "0" * 64}):
        moved = Bundle(copy.path, copy.manifest.model_copy(update={"prepared": (record.model_copy(update=other),)}))
        assert prepared_settings(moved, backend, "fp32") == RuntimeSettings()
    damaged = record.model_copy(update={"settings": {"threads": 0}})
    broken = Bundle(copy.path, copy.manifest.model_copy(update={"prepared": (damaged,)}))
    with pytest.raises(InputError, match=f"settings of {backend}, fp32.*threads"):
        prepared_settings(broken, backend, "fp32")


def test_tuning_keeps_the_fastest_and_stops_in_time(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in whose times are known: chunks of 16 are fastest, then one thread beats two."""

    @contextmanager
    def opened(model: Path, *, noise: NoiseSource, settings: RuntimeSettings) -> Iterator[RuntimeSettings]:
        yield settings

    def known(settings: RuntimeSettings, images: np.ndarray) -> float:
        return abs(settings.chunk - 16) + settings.threads + len(images)

    monkeypatch.setitem(tuning.OPENERS, "openvino", opened)
    monkeypatch.setattr(tuning, "milliseconds", known)
    monkeypatch.setattr(tuning, "hardware", lambda: {"cpu": "one", "cores": 4})
    _, record = tune("openvino", copy, "fp32")
    assert record.settings == {"threads": 1, "chunk": 16, "milliseconds": {"1": 2, "8": 9, "32": 33}}
    monkeypatch.setattr(tuning, "SECONDS", -1.0)
    _, record = tune("openvino", copy, "fp32")
    assert (record.settings["threads"], record.settings["chunk"]) == (4, tuning.CHUNKS[0])
    with pytest.raises(InputError, match="leave it out"):
        tune("openvino", copy, "fp32", (1, 8, 32))


@pytest.mark.parametrize(
    ("costs", "threads", "chunk"),
    [
        (lambda threads, n: n / min(threads, 4), 4, None),  # eight are no faster than four
        (lambda threads, n: n / threads**0.5, 1, None),  # two threads, 1.4 times as fast: 1.4 times the CPU
        (lambda threads, n: n / threads * (1.2 if n > 8 else 1), 6, 8),  # pays to the last core; large batches do not
        (lambda threads, n: 60 * n / threads, None, None),  # too slow to be measured: a thread per core
    ],
)
def test_a_start_takes_the_threads_that_pay(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, costs: Callable[[int, int], float], threads: int, chunk: int
) -> None:
    @contextmanager
    def opened(model: Path, *, noise: NoiseSource, settings: RuntimeSettings) -> Iterator[RuntimeSettings]:
        yield settings

    monkeypatch.setitem(tuning.OPENERS, "openvino", opened)
    monkeypatch.setattr(tuning, "milliseconds", lambda settings, images: costs(settings.threads, len(images)))
    monkeypatch.setattr(tuning, "hardware", lambda: {"cores": 6})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settings = measured_at_start("openvino", copy, "fp32", 6)
    assert (settings.threads, settings.chunk) == (threads, chunk)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert measured_at_start("openvino", copy, "fp32", 6).threads == 3


def test_a_start_with_slow_loading_takes_all_threads(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    elapsed: list[float] = []

    def opened(*arguments: object, **options: object) -> nullcontext[None]:
        elapsed.append(0.6 * tuning.START_SECONDS)  # the second network is open only after the deadline
        return nullcontext()

    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: sum(elapsed)))
    monkeypatch.setitem(tuning.OPENERS, "openvino", opened)
    monkeypatch.setattr(tuning, "milliseconds", lambda predictor, images: 1.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert measured_at_start("openvino", copy, "fp32", 1024).threads is None


def test_the_build_command(copy: Bundle) -> None:
    done = mpdsgr("build", copy.path, "--backend", "openvino", "--json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert prepared_settings(open_bundle(copy.path), "openvino", "fp32").model_dump() == settings
    assert_input_error(mpdsgr("build", copy.path, "--backend", "openvin"), "did you mean 'openvino'")
    assert_input_error(mpdsgr("build", copy.path, "--backend", "openvino", "--precision", "int4"), "it has fp32")


def test_a_manifest_keeps_its_digest_when_a_later_version_adds_a_field(bundle: Bundle) -> None:
    class Later(Manifest):
        more: tuple[str, ...] = ()

    later = Later.model_validate(bundle.manifest.model_dump())
    assert later.computed_digest() == bundle.manifest.digest
    assert later.model_copy(update={"more": ("x",)}).computed_digest() != bundle.manifest.digest
