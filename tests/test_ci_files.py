"""The files that CI systems are given: they follow the systems' schemas, and their very lines run on a real bundle."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import QUICK_GATE, mpdsgr_here, resealed
from packaging.requirements import Requirement
from ruamel.yaml import YAML

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.reference import IMAGES

ROOT = Path(__file__).parent.parent
CI = ROOT / "export" / "ci"
README = (CI / "README.md").read_text()
CALLER, EXTENDER = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
REPORT = "mpdsgr-report"


def load(text: str) -> dict:
    """YAML 1.2, in which `on` is a word and not a truth value."""
    return YAML(typ="safe").load(text)


GITHUB, GITLAB = load((CI / "github.yml").read_text()), load((CI / "gitlab.yml").read_text())
INPUTS = GITHUB["on"]["workflow_call"]["inputs"]
JOB, TEMPLATE = GITHUB["jobs"]["validate"], GITLAB[".mpdsgr-validate"]
LINES = {step["name"]: step["run"] for step in JOB["steps"] if "run" in step}


def run(line: str, cwd: Path, *shell: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One line as the CI system's shell runs it, with the installed command on PATH."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    return subprocess.run([*shell, line], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def given(**values: str) -> dict[str, str]:
    """The environment of GitHub's job for these inputs, defaults for the others."""
    values = {name: values.get(name, settings.get("default", "")) for name, settings in INPUTS.items()}
    return {name: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: values[m[1]], v) for name, v in JOB["env"].items()}


@pytest.fixture
def checkout(bundle: Bundle, tmp_path: Path) -> Path:
    """A checkout with a bundle and two gates, whose names the shell must not split."""
    shutil.copytree(bundle.path, tmp_path / "my bundle")
    (tmp_path / "lax gate.toml").write_text(QUICK_GATE)
    (tmp_path / "hard gate.toml").write_text(f"{QUICK_GATE}floors = {{ worst = 1.0 }}")
    return tmp_path


def validated(line: str, cwd: Path, *shell: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same for a line that validates: how the command ends in this process, called with the shell's words.

    A program in its place writes these words down, and its exit code must become the shell's. That the installed
    command is found on PATH is seen where a bundle is missing.
    """
    programs = cwd / "programs"
    programs.mkdir(exist_ok=True)
    program = programs / "mpdsgr"
    program.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {shlex.quote(str(programs / 'words'))}\nexit 7\n")
    program.chmod(0o755)
    environment = {**os.environ, **environment, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run([*shell, line], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        return mpdsgr_here(*(programs / "words").read_text().split("\0")[:-1])


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ("github-workflows", (CI / "github.yml").read_text()),
        ("github-workflows", CALLER),
        ("gitlab-ci", (CI / "gitlab.yml").read_text()),
        ("gitlab-ci", EXTENDER),
    ],
    ids=["workflow", "caller", "template", "extender"],
)
def test_files_follow_the_schemas(schema: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "file.yml").write_text(text)
    transform = ["--data-transform", "gitlab-ci"] if schema == "gitlab-ci" else []
    command = ["-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *transform, "file.yml"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_inputs_reach_the_shell_as_variables_only() -> None:
    text = (CI / "github.yml").read_text()
    assert set(re.findall(r"inputs\.(\w+)", text)) == set(INPUTS)
    assert not [line for line in LINES.values() if "${{" in line]
    used = set(re.findall(r"\$\{?(\w+)", " ".join(LINES.values()))) - {"GITHUB_STEP_SUMMARY"}
    assert used == set(JOB["env"])
    script = " ".join([*TEMPLATE["before_script"], *TEMPLATE["script"]])
    assert set(re.findall(r"\$\{?(\w+)", script)) == set(TEMPLATE["variables"])


def test_readme_sets_what_exists() -> None:
    calling, extending = load(CALLER)["jobs"], load(EXTENDER)["robustness"]
    assert set(calling["validate"]["with"]) <= set(INPUTS)
    assert extending["extends"] in GITLAB
    assert set(extending["variables"]) <= set(TEMPLATE["variables"])
    downloads = [step["with"]["name"] for step in calling["badge"]["steps"] if "download" in step.get("uses", "")]
    assert downloads == [f"{INPUTS['name']['default']}-badge"]


def test_what_is_installed_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (INPUTS["requirement"]["default"], TEMPLATE["variables"]["MPDSGR_REQUIREMENT"]):
        wanted = Requirement(text)
        assert wanted.name == project["name"]
        assert wanted.extras == {"cpu", "report"} <= set(project["optional-dependencies"])
    for line in (LINES["install"], *TEMPLATE["before_script"]):
        assert shlex.split(line)[:4] == ["python", "-m", "pip", "install"]
        assert "--find-links" in shlex.split(line)  # the package is on no index yet


def test_github_passes_and_shows_the_summary(checkout: Path) -> None:
    environment = given(bundle="my bundle", gate="lax gate.toml")
    done = validated(LINES["validate"], checkout, "bash", "-ec", **environment)
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (checkout / REPORT).iterdir()}
    assert files == {"report.json", "report.html", "junit.xml", "summary.md", "badge.json"}
    assert json.loads((checkout / REPORT / "badge.json").read_text())["color"] == "brightgreen"
    (checkout / "steps.md").write_text("before\n")
    done = run(LINES["summary"], checkout, "bash", "-ec", GITHUB_STEP_SUMMARY=str(checkout / "steps.md"))
    assert done.returncode == 0, done.stderr
    assert (checkout / "steps.md").read_text() == "before\n" + (checkout / REPORT / "summary.md").read_text()
    uploaded = [step["with"]["path"] for step in JOB["steps"] if "upload-artifact" in step.get("uses", "")]
    assert uploaded == [REPORT, f"{REPORT}/badge.json"]
    assert all((checkout / path).exists() for path in uploaded)


def test_gitlab_fails_with_the_gate_and_keeps_the_report(checkout: Path) -> None:
    (line,) = TEMPLATE["script"]
    own = {"MPDSGR_BUNDLE": "my bundle", "MPDSGR_GATE": "hard gate.toml"}
    done = validated(line, checkout, "sh", "-ec", **{**TEMPLATE["variables"], **own})
    assert done.returncode == 1, done.stderr
    assert TEMPLATE["artifacts"]["when"] == "always"
    suite = ElementTree.parse(checkout / TEMPLATE["artifacts"]["reports"]["junit"]).getroot()
    assert int(suite.get("failures", 0)) > 0
    assert [(checkout / path).is_dir() for path in TEMPLATE["artifacts"]["paths"]] == [True]


def test_images_of_another_bundle_are_an_invalid_evaluation_whose_report_says_so(checkout: Path) -> None:
    bundle = checkout / "my bundle"
    with np.load(bundle / IMAGES) as arrays:
        images = dict(arrays)
    np.savez_compressed(bundle / IMAGES, **images | {"pixels": images["pixels"][::-1]})
    resealed(bundle)
    line, environment = LINES["validate"], given(bundle="my bundle", gate="lax gate.toml")
    done = validated(line, checkout, "bash", "-ec", **environment)
    assert done.returncode == 3, done.stderr
    assert "the images are the promised ones" in (checkout / REPORT / "summary.md").read_text()
    assert json.loads((checkout / REPORT / "badge.json").read_text())["color"] != "brightgreen"


def test_a_missing_bundle_is_an_input_error_without_a_report(tmp_path: Path) -> None:
    done = run(LINES["validate"], tmp_path, "bash", "-ec", **given(bundle="no bundle"))  # no gate: no --gate either
    assert done.returncode == 2, done.stderr
    assert "no bundle" in done.stderr
    done = run(LINES["summary"], tmp_path, "bash", "-ec", GITHUB_STEP_SUMMARY=str(tmp_path / "steps.md"))
    assert done.returncode == 0
    assert not (tmp_path / "steps.md").exists()


def test_the_badge_is_pushed_once_it_changes(tmp_path: Path) -> None:
    """The lines of the README in a clone, twice with the same badge and once with another."""
    making = re.search(r"`(git switch --orphan .*?)`", README)
    assert making is not None
    (pushing,) = (step["run"] for step in load(CALLER)["jobs"]["badge"]["steps"] if "run" in step)
    person = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for line, cwd, environment in (
        ("git init -q --bare origin.git && git clone -q origin.git first", tmp_path, {}),
        (f"git commit -q --allow-empty -m first && {making[1]}", tmp_path / "first", person),
        ("git clone -q -b badges origin.git clone", tmp_path, {}),
    ):
        done = run(line, cwd, "bash", "-ec", **environment)
        assert done.returncode == 0, done.stderr
    for badge in ("one", "one", "two"):
        (tmp_path / "clone" / "badge.json").write_text(badge)
        done = run(pushing, tmp_path / "clone", "bash", "-ec")
        assert done.returncode == 0, done.stderr
    log = run("git log --format=%s badges", tmp_path / "origin.git", "bash", "-ec").stdout.split("\n")
    assert log[:3] == ["robustness badge", "robustness badge", "badges"]
