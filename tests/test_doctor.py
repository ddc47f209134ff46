"""What `mpdsgr doctor` says of this machine's backends."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.cli.doctor import state
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.runtime import BACKENDS, NoiseSource

DOCTOR = shipped("export") / "doctor"


def test_the_doctor_says_of_every_backend_whether_it_works(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("onnxruntime-cpu", "openvino", "torch"):
        assert state(bundle, backend, "fp32").startswith("works, ")
    assert "it has fp32" in state(bundle, "openvino", "int4")
    if not torch.cuda.is_available():
        for backend in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
            assert state(bundle, backend, "fp32").startswith("no: ")

    def half_installed(bundle: Bundle, precision: str, noise: NoiseSource) -> None:
        raise RuntimeError("libsomething.so is missing\nand so on")

    monkeypatch.setitem(BACKENDS.loaded, "broken", half_installed)
    assert state(bundle, "broken", "fp32") == "no: RuntimeError: libsomething.so is missing and so on"


def test_the_doctor_needs_neither_a_bundle_nor_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from mpdsgr_deploy.cli import main; main(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert {row["step"] for row in shown["unproved_on_a_gpu"]} == set(gpu.STEPS)  # each waits for a step, and each step
    backends = shown["backends"]
    assert backends.keys() == BACKENDS.keys()
    assert backends["openvino"]["fp32"].startswith("works, ")
    assert re.match("works|no: no GPU can be used", backends["tensorrt-rtx"]["fp32"])  # an engine was built for it
    assert not (DOCTOR / "bundle" / "engines").exists()
    for backend in ("torch", "torch-compile"):
        assert "mpdsgr-deploy[train]" in backends[backend]["fp32"]
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert shown["extras"].keys() == project["optional-dependencies"].keys() - {"dev"}
    assert shown["extras"]["cpu"] == {"onnxruntime": version("onnxruntime")}


def test_the_doctors_network_is_the_one_of_its_recipe_and_small() -> None:
    bundle = open_bundle(DOCTOR / "bundle")
    assert bundle.manifest.recipe == load_recipe(DOCTOR / "recipe.toml").portable()
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) < 150_000
    accuracy = bundle.manifest.variants["fp32"].accuracy
    assert accuracy.correct > 0.9 * accuracy.n
