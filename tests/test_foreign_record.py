"""What was proved with the other libraries, in an environment of their own, is recorded and holds."""

import importlib


def test_recorded_proofs_are_those_of_the_recipes_and_hold() -> None:
    """What needs the libraries was run in an environment of their own; see tests/foreign."""
    recipe_text, page = (importlib.import_module(f"foreign.{name}") for name in ("recipe_text", "page"))
    held_out, faults = page.results("held_out"), page.results("faults")
    assert page.page()[1] == page.render(held_out, faults)
    recipes = recipe_text.recipes()
    assert set(page.cases(held_out)) == set(recipes)
    for name, case in page.cases(held_out).items():
        assert case["code_sha256"] == recipe_text.digest(recipes[name]), f"run held_out.py again for {name}"
        assert case["clean"]["bundle"] == case["clean"]["library"]
        assert case["worst"] <= case["autoattack"] + 0.01 * case["n"]
    healthy = faults["no fault"]["square breaks of these"]
    assert faults["no fault"]["ended"] == 0
    for case in page.cases(faults).values():
        assert case["ended"] != 0 or case["square breaks of these"] <= healthy
