"""What is built and installed: recipes inside, no torch needed to start, a working command in an empty environment."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = {path.name for path in (ROOT / "train" / "recipes").glob("*.toml")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_wheel_and_sdist_contain_the_recipes(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"mpdsgr_deploy/shipped/train/recipes/{name}" for name in RECIPES} <= inside
    assert "mpdsgr_deploy/validation/templates/report.html" in inside
    with tarfile.open(sdist) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert RECIPES | {"README.md", "LICENSE", "pyproject.toml", "test_packaging.py"} <= names


def test_an_empty_environment_gets_a_working_command(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
        wheel,
    ]
    subprocess.run(install, check=True, capture_output=True)
    command = tmp_path / "env" / "bin" / "mpdsgr"
    shown = subprocess.run([command, "--help"], check=True, capture_output=True, text=True).stdout
    assert "validate" in shown
    listed = subprocess.run(
        [command, "recipes", "--json"], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    assert all(Path(name).stem in listed for name in RECIPES)
    done = subprocess.run([command, "train", "digits-reg"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "mpdsgr-deploy[train]" in done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "",
        ".bundle",
        ".attack_graph",
        ".attacks",
        ".runtime",
        ".prediction",
        ".recipe",
        ".data",
        ".cli",
        ".validation.gate",
    ],
)
def test_importing_without_torch_or_onnxruntime(module: str) -> None:
    script = f"import mpdsgr_deploy{module}, sys; print([m for m in ('torch', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_stages_do_not_import_each_other() -> None:
    stages = {"training", "export", "validation", "prediction"}
    for stage in stages:
        for file in (ROOT / "mpdsgr_deploy" / stage).glob("*.py"):
            for other in stages - {stage}:
                assert f"mpdsgr_deploy.{other}" not in file.read_text(), f"{file} imports {other}"
