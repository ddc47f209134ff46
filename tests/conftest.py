"""One small trained network, its bundle, and the command, shared by all tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.export import export
from mpdsgr_deploy.export.precision import PRECISIONS
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.training import train

SMALL = {
    "data": {"name": "digits", "augment": "none"},
    "model": {"name": "vgg-small", "width": 0.25},
    "encoding": {"T": 3},
    "training": {"epochs": 3, "batch_size": 65},
    "attack": {"eps": 0.1, "step": 0.03, "strong_steps": 20, "surrogates": ["triangle:0.5", "rate"]},
    "validation": {"limit": 100},
}


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
def run_without_data(run_dir: Path, tmp_path: Path) -> Path:
    """The same checkpoint, of a data set that is not at hand."""
    copy = tmp_path / "run-without-data"
    copy.mkdir()
    for file in (run_dir / "best").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (copy / "checkpoint.json").read_text()
    (copy / "checkpoint.json").write_text(text.replace('"name": "digits"', '"name": "mnist"'))
    return copy
