"""What is built and installed: recipes inside, no torch needed to start, a working command in an empty environment."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from conftest import QUICK_GATE, perturbed
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from served import BUNDLE

from mpdsgr_deploy.bundle import open_bundle

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


def test_the_metadata_would_be_accepted_by_an_index(built: Path) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel and what its extra `cpu` requires, and nothing else."""
    env = tmp_path_factory.mktemp("installed") / "env"
    venv.create(env, with_pip=False)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", env / "bin" / "python", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-compile", "--no-deps", wheel], check=True, capture_output=True)
    (site,) = (env / "lib").glob("python*/site-packages")
    (wheels_own,) = distributions(path=[str(site)])
    for name in {name for name, _ in required(wheels_own, "cpu")}:
        link(distribution(name), site)
    return env / "bin"


def required(package: Distribution, extra: str) -> set[tuple[str, str]]:
    """The packages that pip would install with this one, by name and extra, from what their metadata say."""
    found, waiting = set(), [(package, extra)]
    while waiting:
        package, extra = waiting.pop()
        for requirement in map(Requirement, package.requires or ()):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            for further in requirement.extras or {""}:
                if (entry := (canonicalize_name(requirement.name), further)) not in found:
                    found.add(entry)
                    waiting.append((distribution(requirement.name), further))
    return found


def link(package: Distribution, site: Path) -> None:
    """Have the files of a package in another environment, which takes pip seconds."""
    for file in package.files or ():
        if ".." not in file.parts:  # programs, beside the modules
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).symlink_to(package.locate_file(file))


def installed(environment: Path, program: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the new environment, which sees nothing of this one or of the checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(environment / program), *map(str, arguments)]
    return subprocess.run(command, env=clean, cwd=cwd, capture_output=True, text=True, check=False)


def test_an_empty_environment_gets_a_working_command(environment: Path, tmp_path: Path) -> None:
    assert "validate" in installed(environment, "mpdsgr", "--help", cwd=tmp_path).stdout
    listed = installed(environment, "mpdsgr", "recipes", "--json", cwd=tmp_path).stdout
    assert all(Path(name).stem in listed for name in RECIPES)
    done = installed(environment, "mpdsgr", "train", "digits-reg", cwd=tmp_path)
    assert done.returncode == 2
    assert "mpdsgr-deploy[train]" in done.stderr


def test_validation_needs_the_extra_cpu_and_no_other(environment: Path, tmp_path: Path) -> None:
    """Neither torch nor the data set, whose images the bundle carries: a healthy bundle passes, a broken one fails."""
    absent = ["torch", "torchvision", "matplotlib", "jinja2", "sklearn", "onnxscript", "onnx_ir"]
    script = f"from importlib.util import find_spec; print([name for name in {absent} if find_spec(name)])"
    assert installed(environment, "python", "-c", script, cwd=tmp_path).stdout.strip() == "[]"
    (tmp_path / "gate.toml").write_text(QUICK_GATE)
    bundle = open_bundle(BUNDLE)  # whose promise is of the tier that the installed package knows
    broken = perturbed(bundle, tmp_path / "broken")
    for path, code in ((bundle.path, 0), (broken, 1)):
        report = tmp_path / f"report-{code}"
        options = ["--gate", "gate.toml", "--report", report]
        done = installed(environment, "mpdsgr", "validate", path, *options, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        assert {p.name for p in report.iterdir()} == {"report.json", "junit.xml", "summary.md", "badge.json"}
        assert "mpdsgr-deploy[report]" in done.stderr
    assert "newly wrong" in done.stdout


LIGHT = (
    *("", ".api", ".bundle", ".attack_graph", ".attacks", ".runtime", ".prediction", ".recipe"),
    *(".serving.deploy.kserve", ".serving.deploy.triton", ".data", ".cli", ".validation.gate"),
)


def test_importing_without_torch_or_onnxruntime() -> None:
    """In one process, and the first module after which either is there is named."""
    script = f"""
import importlib, sys
for module in {LIGHT}:
    importlib.import_module("mpdsgr_deploy" + module)
    if heavy := {{"torch", "onnxruntime"}} & set(sys.modules):
        sys.exit(f"mpdsgr_deploy{{module}} imports {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
