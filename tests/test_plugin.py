"""Another package adds one of each kind: it is built, installed, and used from training to prediction."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_input_error, mpdsgr

ROOT = Path(__file__).parent.parent
RECIPE = """
[data]
name = "stripes"
augment = "none"

[model]
name = "mlp"

[neuron]
surrogate = "bell"

[encoding]
T = 2

[training]
epochs = 2
pictures = 0
batch_size = 32
lr = 0.05
accelerator = "cpu"

[defence.calm]
weight = 0.02

[attack]
eps = 0.05
step = 0.02
strong_steps = 4
surrogates = []
also = ["half-step"]

[gate]
images = 60
max_drop = 0.3
"""
PROGRAM = """
import json
import mpdsgr_deploy as mpd

run = mpd.train("recipe.toml", "run")
bundle = mpd.export(run, "bundle")
report = mpd.validate(bundle, "report", backend="reference")
with mpd.open_predictor(bundle, "reference") as predictor:
    images, _ = mpd.open_bundle("bundle").golden()
    logits = predictor(images)
assert abs(mpd.predict("bundle", images, backend="reference") - logits).max() == 0
print(json.dumps({"verdict": report.verdict, "reasons": [r.line for r in report.reasons], "network": report.network,
                  "backend": report.backend, "conditions": [row.name for row in report.rows],
                  "accuracy": report.rows[0].artefact.accuracy,
                  "surrogate": bundle.manifest.recipe.neuron.surrogate, "logits": logits.shape}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package was installed."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(ROOT / "tests" / "plugin_package", source)
    site = source.parent / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", site, source], check=True)
    return site


def seeing(site: Path, program: str = "") -> str:
    """The prelude of a command that sees what is installed there, as the processes do which it starts; then program."""
    path = os.pathsep.join([str(site), str(ROOT)])
    return f"import os, sys\nsys.path.insert(0, {str(site)!r})\nos.environ['PYTHONPATH'] = {path!r}\n{program}"


def test_train_export_validate_and_predict_with_what_a_package_adds(site: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = mpdsgr("--version", cwd=tmp_path, prelude=seeing(site, PROGRAM))
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-2])
    assert outcome["verdict"] == "pass", outcome["reasons"]
    assert outcome["network"] == "mlp for stripes, trained with CALM, T = 2"
    assert outcome["backend"] == "reference"
    assert outcome["accuracy"] > 0.9
    assert "half-step" in outcome["conditions"]
    assert outcome["surrogate"] == "bell"
    with np.load(tmp_path / "bundle" / "golden.npz") as golden:
        np.save(tmp_path / "images.npy", golden["inputs"])
    predict = ("predict", "bundle", "images.npy", "--backend", "reference")
    done = mpdsgr(*predict, cwd=tmp_path, prelude=seeing(site))
    assert done.returncode == 0, done.stderr
    assert {line.split(",")[1] for line in done.stdout.splitlines()[1:]} <= {"horizontal", "vertical"}


def test_a_broken_package_is_named(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / "spiking_extras" / "stripes.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = mpdsgr("train", "recipe.toml", cwd=tmp_path, prelude=seeing(tmp_path / "site"))
    expected = "data set 'stripes' of the installed package spiking-extras 1.2 cannot be loaded"
    assert_input_error(done, expected, "a_module_that_is_not_there")
