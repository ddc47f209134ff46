"""Conventions that a reader relies on, held over every file of the package, and over what CONTRIBUTING says of it."""

import ast
import re
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mpdsgr_deploy"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
SOURCES = {str(file.relative_to(PACKAGE)): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
LONGEST = 300  # lines


def test_no_file_is_long() -> None:
    lengths = {name: len(source.splitlines()) for name, source in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_class_name_is_used_twice() -> None:
    homes = defaultdict(list)
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert twice == {}


def test_what_contributing_names_exists() -> None:
    terms = re.findall(r"`([^`\n]+)`", CONTRIBUTING)
    paths = [term for term in terms if "/" in term and re.fullmatch(r"[\w/.]+", term) and "X" not in term]
    folders = (ROOT, PACKAGE)
    assert [path for path in paths if not any((folder / path).exists() for folder in folders)] == []
    assert len(paths) > 20
    tests = [file.read_text() for file in (ROOT / "tests").glob("*.py")]
    everything = "\n".join([*SOURCES.values(), *tests])
    names = [term for term in terms if re.fullmatch(r"@?[A-Z_]{4,}|[A-Z][a-z]+[A-Z]\w+|@\w+", term)]
    assert [name for name in names if name.lstrip("@") not in everything] == []


def test_contributing_lists_every_group_of_entry_points() -> None:
    groups = set(re.findall(r'"(mpdsgr_deploy\.[a-z]+)"', "\n".join(s for s in SOURCES.values() if "Registry(" in s)))
    example = tomllib.loads((ROOT / "tests" / "plugin_package" / "pyproject.toml").read_text())
    assert groups
    assert groups == set(example["project"]["entry-points"])
    assert [group for group in groups if f"`{group}`" not in CONTRIBUTING] == []


def test_what_contributing_names_is_defined_where_it_says() -> None:
    named = re.findall(r"`(\w+)` (?:in|of)\s+`([\w/]+\.py)`", CONTRIBUTING)
    assert len(named) > 15
    missing = []
    for name, path in named:
        text = next(file.read_text() for folder in (ROOT, PACKAGE) if (file := folder / path).exists())
        if not re.search(rf"^(?:def|class) {name}\b|^{name}\b.* = ", text, re.MULTILINE):
            missing.append(f"{name} of {path}")
    assert missing == []


def test_every_kind_of_addition_has_its_place_its_registration_and_its_test() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", CONTRIBUTING, re.MULTILINE)
    kinds = {row[0]: row[1:] for row in rows if row[0] not in ("what", "---")}
    text = CONTRIBUTING.partition("## What to add, and where")[2]
    described = {name.lower() for name in re.findall(r"^\*\*An? ([^*]+)\*\*", text, re.MULTILINE)}
    assert described - {"output format"} <= kinds.keys()
    assert len(kinds) > 15
    assert [kind for kind, (_, _, tests) in kinds.items() if not re.search(r"`tests/\w+|`MODELS`|formula", tests)] == []


def test_the_tour_leads_through_six_files() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text().partition("## A tour of six files\n")[2].partition("\n## ")[0]
    files = re.findall(r"^\d\. `([\w/]+\.py)`", tour, re.MULTILINE)
    assert len(files) == 6
    assert [file for file in files if not (ROOT / file).is_file()] == []
