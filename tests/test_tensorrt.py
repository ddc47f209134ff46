"""Engines: built without a GPU by TensorRT-RTX from every kind of network, kept in a bundle, refused in one line."""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import assert_input_error, mpdsgr, mpdsgr_here
from onnx import TensorProto, helper, numpy_helper
from test_export import NAMES, exported

from mpdsgr_deploy.bundle import Bundle, Prepared, open_bundle
from mpdsgr_deploy.errors import InputError, OutOfMemory
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.exporting.precision import PRECISIONS, convert
from mpdsgr_deploy.exporting.precision import plan as precisions_of_layers
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.runtime.tensorrt import build_engine, cuda, prepare
from mpdsgr_deploy.runtime.tensorrt.library import CAPABILITIES, failure, load, one_line_message, served
from mpdsgr_deploy.runtime.tensorrt.prepare import find, machine, timing_cache

RTX = "tensorrt-rtx"
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
E4M3 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
HERE = {"tensorrt": {"gpu": "NVIDIA H200", "compute_capability": "9.0", "tensorrt": "10.16.1.11"}}


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")))


def network(
    path: Path, nodes: list[Any], constants: dict[str, Any], *, inputs: dict[str, list[Any]], opset: int = 21
) -> Path:
    """An ONNX file of float32 `inputs` and the float32 output y; not checked, so that it may be a wrong one."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def quantised_spikes(dtype: Any, per_channel: bool) -> tuple[list[Any], dict[str, Any]]:
    """Spikes and weights through Q/DQ of scale 1 and max |w| / largest; the bias stays float32."""
    weight = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    largest = 127 if dtype == np.int8 else 448
    scale = np.abs(weight).max((1, 2, 3) if per_channel else None).astype(np.float32) / np.float32(largest)
    scaled = weight / scale.reshape(-1, 1, 1, 1)
    nodes = [
        helper.make_node("QuantizeLinear", ["spikes", "one", "zero_point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero_point"], ["dq"]),
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"], **({"axis": 0} if per_channel else {})),
        helper.make_node("Conv", ["dq", "w", "bias"], ["current"]),
    ]
    return nodes, {
        "weight": (np.round(scaled) if dtype == np.int8 else scaled).astype(dtype),
        "scale": scale,
        "zero_point": np.zeros((), dtype),
        "bias": np.ones(4, np.float32),
    }


def half_spikes() -> tuple[list[Any], dict[str, Any]]:
    """A float16 convolution whose current reaches the neuron in float32."""
    nodes = [
        helper.make_node("Cast", ["fires"], ["half"], to=HALF),
        helper.make_node("Conv", ["half", "weight", "bias"], ["half_current"]),
        helper.make_node("Cast", ["half_current"], ["current"], to=FLOAT),
    ]
    return nodes, {"weight": np.ones((4, 4, 3, 3), np.float16), "bias": np.ones(4, np.float16)}


SYNAPSES = {
    "fp16": half_spikes(),
    "int8": quantised_spikes(np.int8, per_channel=True),
    "fp8": quantised_spikes(E4M3, per_channel=False),
}


BUILT = {"vgg-small": PRECISIONS, "wrn16-4": PRECISIONS, "vgg11-slim": ("fp32",)}  # the last of a single step


@pytest.mark.parametrize("name", BUILT)
def test_every_kind_of_model_becomes_an_engine(name: str, tmp_path: Path) -> None:
    _, graph, _ = exported(name)
    for precision in BUILT[name]:
        save(convert(graph, precisions_of_layers(graph, precision)), tmp_path / "model.onnx")
        plan = build_engine(RTX, tmp_path / "model.onnx", (1, 8, 64))
        weights = sum(tensor.ByteSize() for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer)
        assert len(plan) > weights  # the network is in it
        check_header(plan)


def test_no_other_model_has_other_nodes() -> None:
    """What engines are built of in the test above is what every model is made of."""

    def operators(name: str) -> set[tuple[str, ...]]:
        return {(node.op_type, *sorted(node.attributes)) for node in exported(name)[1].graph}

    assert set().union(*map(operators, NAMES)) == set().union(*map(operators, BUILT))


def check_header(plan: bytes) -> None:
    """TensorRT-RTX finds nothing damaged in the plan's header; whether this machine runs it is another question."""
    trt = load(RTX)
    cuda.refuse_invalid(trt, trt.Runtime(trt.Logger()), plan, "")


def test_every_precision_of_a_bundle_becomes_an_engine(copy: Bundle) -> None:
    bundle = copy
    for precision in bundle.manifest.variants:
        bundle, prepared = prepare(RTX, bundle, precision, (1, 2, 4))
        assert prepared.machine == {RTX: load(RTX).__version__}
        check_header(open_bundle(copy.path).file(str(prepared.file)).read_bytes())
    assert [p.precision for p in bundle.manifest.prepared] == list(bundle.manifest.variants)


@pytest.mark.parametrize("precision", SYNAPSES)
def test_a_spiking_layer_of_every_precision_is_parsed(precision: str, tmp_path: Path) -> None:
    """The forms an exporter may write: bool spikes cast to the synapse's type, a float32 neuron behind it."""
    synapse, constants = SYNAPSES[precision]
    nodes = [
        helper.make_node("GreaterOrEqual", ["x", "one"], ["fires"]),
        helper.make_node("Cast", ["fires"], ["spikes"], to=FLOAT),
        *synapse,
        helper.make_node("GreaterOrEqual", ["current", "one"], ["fires_too"]),
        helper.make_node("Where", ["fires_too", "zero", "current"], ["y"]),
    ]
    floats = {"one": np.float32(1), "zero": np.float32(0)}
    model = network(tmp_path / "m.onnx", nodes, {**floats, **constants}, inputs={"x": ["batch", 4, 8, 8]})
    check_header(build_engine(RTX, model, (1, 2, 4)))


def test_a_further_input_gets_the_same_batch(tmp_path: Path) -> None:
    nodes = [helper.make_node("Greater", ["x", "noise"], ["g"]), helper.make_node("Cast", ["g"], ["y"], to=FLOAT)]
    shapes = {"x": ["batch", 3, 8, 8], "noise": ["batch", 3, 8, 8]}
    assert build_engine(RTX, network(tmp_path / "m.onnx", nodes, {}, inputs=shapes), (1, 2, 4))
    shapes["noise"] = [4, "batch", 8, 8]
    with pytest.raises(InputError, match=r"input noise.*only the first dimension may be dynamic"):
        build_engine(RTX, network(tmp_path / "m.onnx", nodes, {}, inputs=shapes), (1, 2, 4))


@pytest.mark.parametrize(
    ("nodes", "opset", "expected"),
    [
        ([helper.make_node("Foo", ["x"], ["y"], name="layer7")], 21, r"refuses node layer7 \(Foo\)"),
        ([helper.make_node("Unique", ["x"], ["y"])], 21, r"node 0 \(Unique\).*an operator it does not have"),
        ([helper.make_node("ConvInteger", ["x", "x"], ["y"])], 21, r"ConvInteger"),
        ([helper.make_node("Neg", ["x"], ["y"])], 25, "opset 25, tensorrt-rtx reads up to 24"),
    ],
)
def test_what_the_parser_refuses_is_named(nodes: list[Any], opset: int, expected: str, tmp_path: Path) -> None:
    model = network(tmp_path / "m.onnx", nodes, {}, inputs={"x": ["batch", 3, 8, 8]}, opset=opset)
    with pytest.raises(InputError, match=expected) as error:
        build_engine(RTX, model, (1, 2, 4))
    assert "\n" not in str(error.value)


def test_types_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    synapse, constants = SYNAPSES["fp16"]
    fires = helper.make_node("GreaterOrEqual", ["x", "one"], ["fires"])
    constants = {**constants, "bias": np.ones(4, np.float32), "one": np.float32(1)}
    nodes = [fires, *synapse, helper.make_node("Identity", ["current"], ["y"])]
    model = network(tmp_path / "m.onnx", nodes, constants, inputs={"x": ["batch", 4, 8, 8]})
    with pytest.raises(InputError, match=r"\(Conv\).*`bias` must be of same type"):
        build_engine(RTX, model, (1, 2, 4))


@pytest.mark.parametrize("batch", [(4, 2, 8), (0, 1, 2), (1, 9, 8), (1, 8, 10**12)])
def test_a_profile_that_makes_no_sense(batch: tuple[int, int, int], bundle: Bundle) -> None:
    with pytest.raises(InputError, match="MIN <= OPT <= MAX"):
        build_engine(RTX, bundle.variant("fp32"), batch)


def test_a_file_that_is_no_network(tmp_path: Path) -> None:
    for content, expected in ((b"not onnx", "not an ONNX file"), (b"", "at least one output")):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(InputError, match=expected):
            build_engine(RTX, tmp_path / "m.onnx", (1, 2, 4))


LEFT_BEHIND = """
import gc, sys
from pathlib import Path
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime.tensorrt import engine

made = engine.listener

def listener(trt):
    class Collecting(type(made(trt))):  # what Python may do at any allocation, at every message
        def log(self, severity, message):
            gc.isenabled() and gc.collect()
            super().log(severity, message)
    return Collecting()

engine.listener = listener
for _ in range(2):
    try:
        engine.build_engine("tensorrt-rtx", Path(sys.argv[1]), (1, 2, 4))
    except InputError as error:
        left = [error]
        left.append(left)  # a cycle: it keeps the failed build's objects until a collection
        del left
"""


def test_garbage_of_a_failed_build_does_not_stop_the_next(tmp_path: Path) -> None:
    """Collected in the middle of a message, it would wait for a lock that its own thread holds."""
    node = helper.make_node("Unique", ["x"], ["y"])
    model = network(tmp_path / "m.onnx", [node], {}, inputs={"x": ["batch", 3, 8, 8]})
    subprocess.run([sys.executable, "-c", LEFT_BEHIND, model], check=True, timeout=60)


def test_building_again_replaces_and_another_profile_joins(copy: Bundle) -> None:
    first, prepared = prepare(RTX, copy, "fp32", (1, 2, 4))
    joined, _ = prepare(RTX, copy, "fp32", (1, 8, 16))  # `copy` does not know of the first: others' work must stay
    assert [p.batch for p in joined.manifest.prepared] == [(1, 2, 4), (1, 8, 16)]
    changed = first.add(prepared.model_copy(update={"file": None}), b"another engine")
    assert [p.batch for p in changed.manifest.prepared] == [(1, 8, 16), (1, 2, 4)]
    assert len(list((copy.path / "engines").iterdir())) == 2
    assert not (copy.path / str(prepared.file)).exists()
    kept = open_bundle(copy.path).prepared(RTX, "fp32")[-1]
    assert (copy.path / str(kept.file)).read_bytes() == b"another engine"


def settings_of(precision: str) -> Prepared:
    return Prepared(backend="openvino", precision=precision, model_sha256="0" * 64, machine={"cpu": "one"})


def test_builds_at_the_same_time_lose_nothing(copy: Bundle) -> None:
    kinds = [f"int{i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda kind: copy.add(settings_of(kind)), kinds))
    assert sorted(p.precision for p in open_bundle(copy.path).manifest.prepared) == sorted(kinds)


def test_an_engine_left_by_a_killed_build_is_removed_by_the_next(copy: Bundle) -> None:
    engines = copy.path / "engines"
    engines.mkdir()
    for name in ("old.plan", ".old.plan.tmp", "notes.md"):
        (engines / name).write_text("left")
    copy.add(settings_of("fp32"), b"an engine")
    (kept,) = open_bundle(copy.path).manifest.prepared
    assert {file.name for file in engines.iterdir()} == {Path(str(kept.file)).name, "notes.md"}


def test_nothing_is_added_to_a_manifest_that_was_changed(copy: Bundle) -> None:
    path = copy.path / "manifest.json"
    changed = path.read_text().replace('"eps": 0.1', '"eps": 0.001', 1)
    path.write_text(changed)
    with pytest.raises(InputError, match="its own digest"):
        copy.add(settings_of("fp32"), b"an engine")
    assert path.read_text() == changed
    assert not (copy.path / "engines").exists()


def test_what_was_built_is_damaged_or_of_another_version(copy: Bundle) -> None:
    _, prepared = prepare(RTX, copy, "fp32", (1, 2, 4))
    again = f"mpdsgr build {copy.path} --backend {RTX} --precision fp32 --batch 1,2,4"
    copy.add(prepared, b"not an engine" * 9)
    with (
        pytest.raises(InputError, match=f"is damaged.*{re.escape(again)}"),
        open_predictor(open_bundle(copy.path), RTX),
    ):
        pass
    copy.add(prepared, b"short")
    with pytest.raises(InputError, match="is damaged"), open_predictor(open_bundle(copy.path), RTX):
        pass
    file = copy.path / str(open_bundle(copy.path).manifest.prepared[-1].file)
    file.write_bytes(b"changed behind the manifest's back")
    with pytest.raises(InputError, match="does not match its hash"):
        open_bundle(copy.path)


def test_validity_bits_that_refuse_and_bits_that_warn(caplog: pytest.LogCaptureFixture) -> None:
    trt = load(RTX)
    kinds = trt.EngineInvalidityDiagnostics

    class Loader:
        def __init__(self, *found: Any) -> None:
            self.bits = sum(kind.value for kind in found)

        def get_engine_validity(self, plan: bytes) -> tuple[Any, int]:
            return trt.EngineValidity.INVALID, self.bits

    with pytest.raises(InputError, match=r"of another version.*VERSION_MISMATCH.*build it again"):
        cuda.refuse_invalid(trt, Loader(kinds.VERSION_MISMATCH, kinds.UNSUPPORTED_CC), b"", "build it again")
    cuda.refuse_invalid(trt, Loader(kinds.UNSUPPORTED_CC), b"", "")  # said on GPUs that do run it
    assert "UNSUPPORTED_CC" in caplog.text
    cuda.refuse_invalid(trt, object(), b"", "")  # full TensorRT cannot be asked


def with_engine(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with what looks like a TensorRT engine for an H200."""
    sha = bundle.manifest.files["model.fp32.onnx"]
    fields = {"precision": "fp32", "model_sha256": sha, "machine": HERE["tensorrt"], "batch": (1, 8, 16), **changes}
    return bundle.add(Prepared(backend="tensorrt", **fields), json.dumps(changes).encode())


def test_the_engine_that_fits_is_found(copy: Bundle) -> None:
    here = HERE["tensorrt"]
    bundle = with_engine(copy, machine={**here, "gpu": "NVIDIA L4", "compute_capability": "8.9"})
    for batch in ((4, 8, 16), (1, 2, 4), (1, 8, 32), (1, 8, 16)):
        bundle = with_engine(bundle, batch=batch)
    assert find("tensorrt", bundle, "fp32", here).batch == (1, 8, 32)
    names = [p.file for p in bundle.manifest.prepared]
    assert len(set(names)) == 5
    assert "engines/tensorrt-nvidia-l4-8.9-10.16.1.11-fp32-batch-1-8-16-" in str(names[0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"machine": {**HERE["tensorrt"], "gpu": "NVIDIA L4"}},
            "was built for gpu NVIDIA L4 and this machine has gpu NVI",
        ),
        ({"machine": {**HERE["tensorrt"], "tensorrt": "10.17"}}, "built for tensorrt 10.17 .* has tensorrt 10.16.1.11"),
        ({"model_sha256": "0" * 64}, "was built from another model.fp32.onnx"),
        ({"batch": None}, "no batches"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(changes: dict[str, Any], expected: str, copy: Bundle) -> None:
    bundle = with_engine(copy, **changes)
    profile = ",".join(map(str, changes.get("batch", (1, 8, 16)) or (1, 32, 128)))
    command = f"mpdsgr build {copy.path} --backend tensorrt --precision fp32 --batch {profile}"
    with pytest.raises(InputError, match=expected) as error:
        find("tensorrt", bundle, "fp32", HERE["tensorrt"])
    assert str(error.value).endswith(f"build it again with: {command}")


def test_without_an_engine_or_a_gpu_the_next_step_is_named(copy: Bundle) -> None:
    command = re.escape(f"mpdsgr build {copy.path} --backend {RTX} --precision fp32")
    with pytest.raises(InputError, match=f"holds no {RTX} engine of fp32; build it here with: {command}"):
        find(RTX, copy, "fp32", machine(RTX))
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    prepare(RTX, copy, "fp32", (1, 2, 4))
    with pytest.raises(InputError, match="no GPU can be used here"), open_predictor(open_bundle(copy.path), RTX):
        pass
    with pytest.raises(InputError, match=r"tensorrt is needed.*mpdsgr-deploy\[tensorrt\]|no GPU"):
        prepare("tensorrt", copy, "fp32")


def test_the_command_builds_and_says_what_is_next(copy: Bundle, tmp_path: Path) -> None:
    done = mpdsgr("build", copy.path, "--backend", RTX, "--batch", "1,8,64", "--json")
    made = json.loads(done.stdout)
    assert (made["batch"], made["precision"], made["seconds"] > 0) == ([1, 8, 64], "fp32", True)
    assert open_bundle(copy.path).file(made["file"]).stat().st_size > 1000
    shown = mpdsgr("build", copy.path, "--backend", RTX).stdout
    assert "batch-1-32-128" in shown
    assert f"mpdsgr validate {copy.path}@fp32 --backend {RTX}" in shown
    for arguments, expected in (
        (["--backend", "tensorrt-rt"], "did you mean 'tensorrt-rtx'"),
        (["--backend", RTX, "--precision", "int4"], "it has fp32"),
        (["--backend", RTX, "--batch", "8,4,2"], "MIN <= OPT <= MAX"),
        (["--backend", RTX, "--batch", "8"], "three whole numbers"),
    ):
        assert_input_error(mpdsgr("build", copy.path, *arguments), expected)
    assert_input_error(mpdsgr("build", tmp_path, "--backend", RTX), "not a bundle")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("h200", "has no kernels for h200 (compute capability 9.0), only for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; use"),
        ("8.9,Orin", "has no kernels for Orin (compute capability 8.7)"),
        ("10.0", "has no kernels for 10.0"),
        ("7.5", "Turing"),  # it has kernels for this GPU, but none for float32 matrix products
    ],
)
def test_a_target_that_the_library_does_not_serve_is_refused(target: str, expected: str, copy: Bundle) -> None:
    assert_input_error(mpdsgr_here("build", copy.path, "--backend", RTX, "--target", target), expected)
    assert not open_bundle(copy.path).manifest.prepared


def test_the_manual_says_which_gpus_are_served_and_how_trtexec_builds_every_precision() -> None:
    manual = (Path(__file__).parent.parent / "export" / "README.md").read_text()
    listed = re.findall(r"^\| [^|]+ \| (\d+\.\d[\d.; ]*) \| ([^|]+) \|", manual, re.MULTILINE)
    yes = {capability for row, answer in listed for capability in row.split("; ") if not answer.startswith("no")}
    assert yes == set(served(load(RTX)))
    assert {capability for row, _ in listed for capability in row.split("; ")} == set(CAPABILITIES.values())
    for precision in PRECISIONS:
        assert f"trtexec --onnx=model.{precision}.onnx --stronglyTyped --noTF32" in manual


def test_an_engine_for_named_targets_is_built(copy: Bundle) -> None:
    half = shipped("export") / "doctor" / "bundle" / "model.fp16.onnx"
    assert build_engine(RTX, half, (1, 2, 4), targets=["t4"])  # as the manual says, of all precisions this one alone
    done = mpdsgr_here("build", copy.path, "--backend", RTX, "--target", "l4,12.0")
    assert done.returncode == 0, done.stderr
    assert_input_error(mpdsgr_here("build", copy.path, "--backend", "openvino", "--target", "l4"), "--target is for")


def test_the_timing_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing_cache(HERE["tensorrt"]) == tmp_path / "mpdsgr-deploy" / "NVIDIA-H200-9.0-10.16.1.11.timing"


def test_messages_become_one_line_and_full_memory_its_own_error() -> None:
    told = ["catchCudaError", "Error Code 2: OutOfMemory\n(no memory In allocate at /_src/a.cpp:12 left)"]
    assert one_line_message(told[1]) == "Error Code 2: OutOfMemory (no memory left)"
    heard = SimpleNamespace(errors=told)
    assert isinstance(failure(heard, "it failed", "buy more"), OutOfMemory)
    later = failure(heard, "it failed", "ask")  # for another reason than that
    assert "it does not say why" in str(later)
    assert not isinstance(later, OutOfMemory)
