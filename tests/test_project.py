"""The project's own files follow the schemas of those who read them, and agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mpdsgr_deploy import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CHECKED = {
    "github-workflows": WORKFLOWS,
    "github-issue-forms": [TEMPLATES / "bug.yml", TEMPLATES / "evaluation.yml"],
    "github-issue-config": [TEMPLATES / "config.yml"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has no .github")


@pytest.mark.parametrize("schema", CHECKED)
def test_files_follow_their_schema(schema: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*command, *map(str, CHECKED[schema])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_workflows_call_make_and_have_no_more_rights_than_they_need() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for file in WORKFLOWS:
        workflow = YAML(typ="safe").load(file.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 60
            for step in job["steps"]:
                made = re.match(r"make ([a-z-]+)", step.get("run", ""))
                assert made is None or made[1] in targets
                assert "${{" not in step.get("run", "")  # a value could be read as a command


def test_versions_of_python_are_the_same_everywhere() -> None:
    versions = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    workflow = YAML(typ="safe").load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert set(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == versions
    makefile, readme = ((ROOT / name).read_text() for name in ("Makefile", "README.md"))
    for version in versions:
        assert version in makefile
        assert version in readme


def test_the_citation_and_the_changelog_name_this_version() -> None:
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    fields = dict(
        re.findall(r"^  (\w+) = \{(.+)\},?$", (ROOT / "CITATION.bib").read_text().split("@misc")[0], re.MULTILINE)
    )
    assert [fields[name] for name in ("title", "version", "license")] == [
        citation[name] for name in ("title", "version", "license")
    ]
    assert f"{{{citation['authors'][0]['name']}}}" == fields["author"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"
    kinds = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
