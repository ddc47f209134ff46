"""What was proved with the other libraries, in an environment of their own, is recorded and holds."""

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that renders the tables of export/ADOPT.md."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "foreign"))
    return importlib.import_module("page")


def test_tables_are_what_one_run_each_wrote(page: Any) -> None:
    for name in page.published():
        result = page.load(name)
        assert page.shown(name) == page.TABLES[name](result), f"run python tests/foreign/page.py after {name}.py"
        assert len(result["provenance"]["revision"]) == 40  # of a checkout without changes
        assert {"n", "seed"} <= result["setting"].keys()


def test_recipes_of_other_libraries_answer_alike_and_are_attacked_as_well(page: Any) -> None:
    recipe_text, result = importlib.import_module("recipe_text"), page.load("held_out")
    recipes, n = recipe_text.recipes(), result["setting"]["n"]
    assert set(result["records"]) == set(recipes)
    for name, case in result["records"].items():
        assert case["code_sha256"] == recipe_text.digest(recipes[name]), f"run held_out.py again for {name}"
        assert case["clean"]["bundle"] == case["clean"]["library"]
        assert case["worst"] <= case["autoattack"] + 0.01 * n


def test_no_planted_fault_is_let_through(page: Any) -> None:
    planted, records = importlib.import_module("planted"), page.load("faults")["records"]
    assert set(records) == set(planted.FAULTS)
    healthy = records[page.HEALTHY]
    assert healthy["ended"] == 0
    assert [name for name, case in records.items() if page.let_through(case, healthy)] == []
    refused = {name for name, case in records.items() if case["ended"] != 0}
    assert {"a spike node missed", "thresholds swapped", "a comparison hidden behind a Cast chain"} <= refused
    assert {"straight-through where a surrogate belongs", "an input scale applied twice"} <= refused


def test_a_fault_is_let_through_if_the_gate_passes_more_than_without_it(page: Any) -> None:
    healthy = {"ended": 0, "kept": list(range(20)), "square breaks": [0]}
    weaker = {"ended": 0, "kept": list(range(28)), "square breaks": [0]}
    broken = {"ended": 0, "kept": list(range(20)), "square breaks": list(range(9))}
    assert [page.let_through(case, healthy) for case in (healthy, weaker, broken)] == [False, True, True]
    assert not page.let_through(weaker | {"ended": 3}, healthy)
    assert not page.let_through({"ended": 0, "kept": list(range(6)), "square breaks": [0, 1]}, healthy)
