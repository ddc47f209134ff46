"""One small trained network, its bundle, and the command, shared by all tests."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from mpdsgr_deploy.attack_graph import derived
from mpdsgr_deploy.bundle import Bundle, Manifest, open_bundle
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.exporting.precision import PRECISIONS
from mpdsgr_deploy.files import sha256
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.training import train

SMALL = {
    "data": {"name": "digits", "augment": "none"},
    "model": {"name": "vgg-small", "width": 0.25},
    "encoding": {"T": 3},
    "training": {"epochs": 3, "batch_size": 65},
    "attack": {"eps": 0.1, "step": 0.03, "strong_steps": 20, "surrogates": ["triangle:0.5", "rate"]},
    "validation": {"limit": 100},
}
QUICK_GATE = "images = 20\nmax_drop = 0.45\n"  # as few images as can decide anything, in seconds


def small_recipe(**sections: dict[str, object]) -> Recipe:
    """The small recipe with some fields of some sections replaced."""
    values = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
    return Recipe.model_validate(values)


def mpdsgr(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process, as a user would."""
    command = [sys.executable, "-m", "mpdsgr_deploy", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def mpdsgr_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in this process: seconds faster, where only its last line and exit code are of interest."""
    done = CliRunner().invoke(main, [*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def assert_input_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, no traceback, one last line that says what is wrong."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in line, line


def resealed(bundle: Path) -> Path:
    """Make the manifest's hashes those of the files as they are now, as somebody who tampers with a bundle would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = {name: sha256(bundle / name) for name in manifest["files"]}
    manifest["digest"] = Manifest.model_validate(manifest).computed_digest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def perturbed(bundle: Bundle, out: Path) -> Path:
    """A copy in which the network's weights are off, and golden batch, attack graph and hashes go along with that."""
    shutil.copytree(bundle.path, out)
    file = out / "model.fp32.onnx"
    network = onnx.load(file)
    (readout,) = (i for i in network.graph.initializer if i.name == "readout.weight")
    noise = np.random.default_rng(0).normal(0, 0.3, tuple(readout.dims)).astype(np.float32)
    readout.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(readout) + noise, readout.name))
    onnx.save(network, file)
    (out / "attack.fp32.onnx").write_bytes(derived(file, trained_surrogate(bundle.manifest.recipe)))
    inputs, _ = bundle.golden()
    with OnnxRuntime(file) as broken:
        np.savez(out / "golden.npz", inputs=inputs, fp32=broken(inputs))
    return resealed(out)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train(small_recipe(), out)
    return out


@pytest.fixture(scope="session")
def bundle(run_dir: Path) -> Bundle:
    out = run_dir.parent / "bundle"
    export(run_dir, out)
    return open_bundle(out)


@pytest.fixture(scope="session")
def precise(run_dir: Path) -> Bundle:
    """The same network in every precision."""
    out = run_dir.parent / "precise"
    export(run_dir, out, precisions=PRECISIONS)
    return open_bundle(out)


@pytest.fixture
def loggers() -> Iterator[None]:
    """The logging of this process as it was before a command in it set up its own."""
    found = [logging.getLogger(name) for name in (None, "mpdsgr_deploy")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in found]
    yield
    logging.captureWarnings(False)
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def run_without_data(run_dir: Path, tmp_path: Path) -> Path:
    """The same checkpoint, of a data set that is not at hand."""
    copy = tmp_path / "run-without-data"
    copy.mkdir()
    for file in (run_dir / "best").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (copy / "checkpoint.json").read_text()
    (copy / "checkpoint.json").write_text(text.replace('"name": "digits"', '"name": "mnist"'))
    return copy
