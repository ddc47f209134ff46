"""A bundle that was damaged, tampered with or comes from the future is refused in one line."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpdsgr_deploy.atomic_files import sha256
from mpdsgr_deploy.bundle import Bundle, Manifest, open_bundle
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.runtime import OnnxRuntime, open_predictor
from mpdsgr_deploy.schema import parse


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "bundle"))


def edit(path: Path, **changes: Any) -> None:
    """Change the manifest and, as somebody who means it would, its digest."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(changes)
    with contextlib.suppress(InputError):
        manifest["digest"] = parse(Manifest, manifest, "").computed_digest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def refused(path: Path, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as error:
        open_bundle(path)
    assert "\n" not in str(error.value)


def test_a_good_bundle_opens_and_answers(copy: Path) -> None:
    opened = open_bundle(copy)
    inputs, logits = opened.golden()
    with open_predictor(opened) as predictor:
        np.testing.assert_allclose(predictor(inputs), logits, atol=1e-5)


@pytest.mark.parametrize("name", ["model.fp32.onnx", "weights.safetensors", "golden.npz"])
def test_a_changed_byte(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    refused(copy, f"{name} does not match its hash")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"0"', '"8"'), ('"eps": 0.1', '"eps": 0.001'), ('"tau": 0.5', '"tau": 0.6'), ('"n": 100', '"n": 99')],
)
def test_a_changed_byte_of_the_manifest(copy: Path, old: str, new: str) -> None:
    text = (copy / "manifest.json").read_text()
    assert old in text
    (copy / "manifest.json").write_text(text.replace(old, new, 1))
    refused(copy, "its own digest")


def test_a_golden_batch_of_other_labels(copy: Path) -> None:
    edit(copy, labels=["cat", "dog"])
    with pytest.raises(InputError, match="does not fit the 2 labels"):
        open_bundle(copy).golden()


@pytest.mark.parametrize("name", ["model.fp32.onnx", "weights.safetensors", "golden.npz"])
def test_a_missing_hash_or_file(copy: Path, name: str) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    edit(copy, files={k: v for k, v in files.items() if k != name})
    refused(copy, "lists no hash")
    edit(copy, files=files)
    (copy / name).unlink()
    refused(copy, f"{name} is missing")


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "a/../../outside.onnx", "/etc/hostname", "..\\outside.onnx", "link", "loop", "nul\0"]
)
def test_a_path_that_leaves_the_bundle(copy: Path, name: str) -> None:
    outside = copy.parent / "outside.onnx"
    shutil.copyfile(copy / "model.fp32.onnx", outside)
    if name == "link":
        (copy / "link").symlink_to(outside)
    if name == "loop":
        (copy / "loop").symlink_to(copy / "loop")
    manifest = json.loads((copy / "manifest.json").read_text())
    variants = {"fp32": {"file": name, "accuracy": None}}
    edit(copy, variants=variants, files={**manifest["files"], name: sha256(outside)})
    refused(copy, "is outside the bundle")


def test_newer_schema_unknown_key_and_other_nonsense(copy: Path, tmp_path: Path) -> None:
    edit(copy, schema_version=99)
    refused(copy, "schema version 99.*upgrade")
    for nonsense in ("99", 99.0, 0, None, True):
        edit(copy, schema_version=nonsense)
        refused(copy, "no valid schema_version")
    edit(copy, schema_version=1, extra_key=1)
    refused(copy, "unknown key 'extra_key'")
    variants = json.loads((copy / "manifest.json").read_text())["variants"]
    edit(copy, variants={"fp32": {**variants["fp32"], "speed": 9}})
    refused(copy, "variants.fp32.speed")
    (copy / "manifest.json").write_text("{")
    refused(copy, "not JSON")
    (copy / "manifest.json").write_text("[" * 100_000)
    refused(copy, "not JSON")
    (copy / "manifest.json").write_text("[]")
    refused(copy, "manifest.json")
    refused(tmp_path / "nothing", "mpdsgr export")


def test_export_never_overwrites_what_is_not_a_bundle(run_dir: Path, tmp_path: Path, copy: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("x")
    with pytest.raises(InputError, match="not a bundle of mpdsgr"):
        export(run_dir, tmp_path / "mine")
    assert (tmp_path / "mine" / "photo.jpg").exists()
    for name, marker in (("dots", ".git"), ("web", "manifest.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / marker).write_text('{"name": "my app"}')
        with pytest.raises(InputError, match=r"not a bundle of mpdsgr|no valid schema_version"):
            export(run_dir, tmp_path / name)
        assert (tmp_path / name / marker).exists()
    (copy / "NOTES.md").write_text("mine")
    with pytest.raises(InputError, match=r"NOTES\.md, which is not part of the bundle"):
        export(run_dir, copy)
    (copy / "NOTES.md").unlink()
    before = sha256(copy / "model.fp32.onnx")
    assert sha256(export(run_dir, copy, limit=10).variant("fp32")) == before
    assert [p.name for p in copy.parent.iterdir() if p.name.startswith(".")] == []


def test_export_follows_a_link_and_recovers_a_swap_that_died(run_dir: Path, copy: Path) -> None:
    link = copy.parent / "link"
    link.symlink_to(copy)
    export(run_dir, link, limit=10)
    assert link.is_symlink()
    assert open_bundle(copy).manifest.variants["fp32"].accuracy.n == 10
    copy.rename(copy.parent / ".bundle.old")  # killed between the two renames
    export(run_dir, copy, limit=20)
    assert open_bundle(copy).manifest.variants["fp32"].accuracy.n == 20
    assert not (copy.parent / ".bundle.old").exists()


def test_the_golden_batch_catches_a_network_that_answers_otherwise(copy: Path, bundle: Bundle) -> None:
    """Consistent hashes, wrong content: golden logits that are not this network's."""
    inputs, logits = bundle.golden()
    np.savez(copy / "golden.npz", inputs=inputs, fp32=np.roll(logits, 1, axis=1))
    manifest = json.loads((copy / "manifest.json").read_text())
    edit(copy, files={**manifest["files"], "golden.npz": sha256(copy / "golden.npz")})
    with pytest.raises(EvaluationError, match="golden batch wrongly"), open_predictor(open_bundle(copy)):
        pass


def test_unknown_precision_and_backend(bundle: Bundle) -> None:
    for backend in ("onnxruntime-cpu", "torch"):
        with pytest.raises(InputError, match="it has fp32"), open_predictor(bundle, backend, precision="int4"):
            pass
    with pytest.raises(InputError, match="did you mean 'onnxruntime-cpu'"), open_predictor(bundle, "onnxruntime-cp"):
        pass


def test_outputs_are_fresh(bundle: Bundle) -> None:
    inputs, _ = bundle.golden()
    for backend in ("onnxruntime-cpu", "torch"):
        with open_predictor(bundle, backend) as predictor:
            first = predictor(inputs)
            kept = first.copy()
            predictor(inputs[::-1].copy())
            assert np.array_equal(first, kept)
            first[:] = 0
            assert np.array_equal(predictor(inputs), kept)


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "torch"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.astype(np.float64), "float64"),
        (lambda x: (x * 255).astype(np.uint8), "uint8"),
        (lambda x: x[:, :, :7], "shape"),
        (lambda x: x[0], "shape"),
        (lambda x: x[:0], "shape"),
        (lambda x: np.repeat(x, 3, axis=1), "shape"),
        (lambda x: np.where(x > 0.5, np.nan, x).astype(np.float32), "finite"),
        (lambda x: np.where(x > 0.5, np.inf, x).astype(np.float32), "finite"),
        (lambda x: x * 255, r"\[0, 1\]"),
        (lambda x: x - 0.1, r"\[0, 1\]"),
    ],
)
def test_bad_images_are_refused(bundle: Bundle, backend: str, change: Any, expected: str) -> None:
    inputs, _ = bundle.golden()
    with open_predictor(bundle, backend) as predictor, pytest.raises(InputError, match=expected):
        predictor(change(inputs))


def test_the_silent_fallback_is_refused(bundle: Bundle) -> None:
    """This onnxruntime may know CUDA or not; without a GPU both must be an error, never an answer from the CPU."""
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="CUDAExecutionProvider"), open_predictor(bundle, "onnxruntime-cuda"):
            pass


def test_a_session_that_fell_back_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU package does without a driver: the provider is listed, the session silently runs on the CPU."""
    import onnxruntime

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, providers: real(path))
    with pytest.raises(InputError, match="onnxruntime used CPUExecutionProvider instead"):
        OnnxRuntime(bundle.variant("fp32"), "CUDAExecutionProvider")


def test_a_corrupt_network_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(InputError, match="cannot load"):
        OnnxRuntime(tmp_path / "model.onnx")
