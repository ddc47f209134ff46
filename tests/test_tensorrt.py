"""Engines that TensorRT-RTX builds without a GPU: kept in a bundle, found again, refused in one line."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_input_error, mpdsgr, mpdsgr_here
from rtx import RTX, check_header

from mpdsgr_deploy.bundle import Bundle, Prepared, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.precision import PRECISIONS
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.runtime.tensorrt import build_engine, cuda, prepare
from mpdsgr_deploy.runtime.tensorrt.engine import find, machine, timing_cache
from mpdsgr_deploy.runtime.tensorrt.library import CAPABILITIES, compute_capabilities, load

HERE = {"tensorrt": {"gpu": "NVIDIA H200", "compute_capability": "9.0", "tensorrt": "10.16.1.11"}}


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")))


def test_every_precision_of_a_bundle_becomes_an_engine(copy: Bundle) -> None:
    bundle = copy
    for precision in bundle.manifest.variants:
        bundle, prepared = prepare(RTX, bundle, precision, (1, 2, 4))
        assert prepared.machine == {RTX: load(RTX).__version__}
        check_header(open_bundle(copy.path).file(str(prepared.file)).read_bytes())
    assert [p.precision for p in bundle.manifest.prepared] == list(bundle.manifest.variants)


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
    with pytest.raises(InputError, match=r"needs the package tensorrt.*mpdsgr-deploy\[tensorrt\]|no GPU"):
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
        (["--backend", RTX, "--batch", "8"], "write 3 whole numbers"),
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
    assert yes == set(compute_capabilities(load(RTX)))
    assert {capability for row, _ in listed for capability in row.split("; ")} == set(CAPABILITIES.values())
    for precision in PRECISIONS:
        assert f"trtexec --onnx=model.{precision}.onnx --stronglyTyped --noTF32" in manual


def test_an_engine_for_named_targets_is_built(copy: Bundle) -> None:
    half = shipped("export") / "doctor" / "bundle" / "model.fp16.onnx"
    assert build_engine(RTX, half, (1, 2, 4), targets=["t4"])  # as the manual says, of all precisions this one alone
    done = mpdsgr_here("build", copy.path, "--backend", RTX, "--target", "l4,12.0")
    assert done.returncode == 0, done.stderr


def test_the_timing_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing_cache(HERE["tensorrt"]) == tmp_path / "mpdsgr-deploy" / "NVIDIA-H200-9.0-10.16.1.11.timing"
