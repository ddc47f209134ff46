"""Imports run one way: no circles between modules or between packages, read from the sources, lazy imports included.

Modules of one package may not even name each other for type checking alone.
"""

import ast
import graphlib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import mpdsgr_deploy

PACKAGE = Path(__file__).parent.parent / "mpdsgr_deploy"
STAGES = {"training", "exporting", "validation", "prediction", "serving", "experiments"}
ALLOWED = {"training.preflight"}  # exports a small network of the recipe before a long training, as export would after


def module_name(file: Path) -> str:
    """The dotted name below the package; the package itself is ""."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imported(file: Path, *, for_types: bool = False) -> set[str]:
    """The modules of this package that a file imports when it runs; those for type checking alone with `for_types`."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    inside = {name.removeprefix("mpdsgr_deploy").lstrip(".") for name in names if name.split(".")[0] == "mpdsgr_deploy"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in inside}


@cache
def imports(*, for_types: bool = False) -> dict[str, set[str]]:
    """What each module imports; read by the first test that asks, since every worker collects this file."""
    return {name: imported(file, for_types=for_types) - {name} for name, file in MODULES.items()}


def room(module: str) -> str:
    """The package or single module right below `mpdsgr_deploy` that a module belongs to."""
    return module.partition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle of a graph; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_the_parser_sees_imports_of_every_form() -> None:
    assert "surrogates" in imports()["snn.surrogate"]
    assert "snn.triton_lif" in imports()["snn.multistep"]  # inside a function
    assert "api" not in imports()[""]  # for type checking alone
    assert "api" in imports(for_types=True)[""]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("package", sorted({room(name) for name in MODULES if "." in name}))
def test_no_circle_within_a_package(package: str) -> None:
    inside = {name: set(targets) for name, targets in imports(for_types=True).items() if room(name) == package}
    inside = {name: {target for target in targets if target in inside} for name, targets in inside.items()}
    assert circle(inside) == []


def test_no_circle_between_packages() -> None:
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, targets in imports().items():
        rooms[room(name)] |= {room(target) for target in targets}
    assert circle({name: targets - {name, ""} for name, targets in rooms.items() if name}) == []


def test_stages_do_not_import_each_other() -> None:
    for name, targets in imports().items():
        if room(name) in STAGES - {"experiments"} and name not in ALLOWED:
            others = {target for target in targets if room(target) in STAGES - {room(name)}}
            assert not others, f"{name} imports {others}"


def test_no_module_hides_a_public_function() -> None:
    """Importing a module sets an attribute of the package, in place of the function that is looked up lazily."""
    assert set(mpdsgr_deploy.__all__) & {room(name) for name in MODULES} == set()
