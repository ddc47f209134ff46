"""Another package adds one of each kind: it is built, installed, and used from training to prediction."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a Python that sees the package installed, in a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(ROOT / "tests" / "plugin_package", source)
    site = source.parent / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", site, source], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def python(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_train_export_validate_and_predict_with_what_a_package_adds(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = python("-c", PROGRAM, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["verdict"] == "pass", outcome["reasons"]
    assert outcome["network"] == "mlp for stripes, trained with CALM, T = 2"
    assert outcome["backend"] == "reference"
    assert outcome["accuracy"] > 0.9
    assert "half-step" in outcome["conditions"]
    assert outcome["surrogate"] == "bell"
    predict = ["-m", "mpdsgr_deploy", "predict", "bundle", "images.npy", "--backend", "reference"]
    python(
        "-c",
        "import numpy; numpy.save('images.npy', numpy.load('bundle/golden.npz')['inputs'])",
        cwd=tmp_path,
        env=environment,
    )
    done = python(*predict, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert {line.split(",")[1] for line in done.stdout.splitlines()[1:]} <= {"horizontal", "vertical"}


def test_a_broken_package_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    site = Path(environment["PYTHONPATH"].partition(os.pathsep)[0])
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / "spiking_extras" / "stripes.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    env = {**environment, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    done = python("-m", "mpdsgr_deploy", "train", "recipe.toml", cwd=tmp_path, env=env)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert "data set 'stripes' of the installed package spiking-extras 1.2 cannot be loaded" in message
    assert "a_module_that_is_not_there" in message
