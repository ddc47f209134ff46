"""Files with the rules of a gate: which are refused, what they pin, and what promise they can be held against."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coarse_gates import coarse

from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import TIERS, resolved
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Gate, Recipe
from mpdsgr_deploy.reference import Reference
from mpdsgr_deploy.validation import gate as rules_of_the_gate
from mpdsgr_deploy.validation.comparison import Comparison, compare_conditions
from mpdsgr_deploy.validation.gate import (
    SIGNIFICANT,
    check_gate,
    load_gate,
)
from mpdsgr_deploy.validation.rules import check_pins, chosen_tier, settled, stated_rules

GATES = Path(__file__).parent.parent / "export" / "gates"
NAMES = ("clean", "pgd", "worst")


@pytest.mark.parametrize(
    ("rules", "n", "referenced", "expected"),
    [
        (Gate(floors={"pdg": 0.1}), 100, NAMES, "rule for 'pdg', which is not evaluated here: clean, pgd, worst"),
        (Gate(drops={"apgd-ce": 0.1}), 100, NAMES, "rule for 'apgd-ce'"),
        (
            Gate(drops={"pgd": 0.1}),
            100,
            ("clean",),
            "limits the drop under 'pgd', with which the bundle's reference was not",
        ),
        (Gate(drops={"pgd": 0.1}, floors={"pgd": 0.1}), 100, (), "limits the drop under 'pgd'"),
        (Gate(), 100, (), "nothing to decide"),
        (Gate(max_drop=0.05), 79, NAMES, "79 images cannot decide this gate, which needs 80"),
        (Gate(max_drop=0.0), 4, NAMES, "which needs 5"),
        (Gate(floors={"worst": 0.9}), 34, (), "which needs 35"),
    ],
)
def test_gates_that_cannot_decide_are_refused(rules: Gate, n: int, referenced: tuple[str, ...], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as error:
        check_gate(rules, NAMES, n, referenced)
    assert "\n" not in str(error.value)


def test_gates_that_can_decide_are_taken() -> None:
    check_gate(Gate(max_drop=0.05), NAMES, 80, NAMES)
    check_gate(Gate(floors={"worst": 0.9}), NAMES, 35, ())
    check_gate(Gate(max_drop=0.01, drops={"clean": 0.2}), NAMES, 20, ("clean",))


class Silent:
    """A network that is never asked."""

    stochastic = False


def comparable(tier: str, reference: Reference, recipe: Recipe) -> Comparison:
    """What of a tier can be held against a reference."""
    suite = Suite.of(Source(Silent(), "triangle:1"), TIERS[tier].entries, recipe.attack, seed=0)
    return compare_conditions(reference, suite.conditions, 20)


def met(tiers: list[str], recipe: Recipe) -> Reference:
    """A reference that met the conditions of the last of these tiers, and nested those of the others."""
    *smaller, own = [list(resolved(TIERS[tier].entries, recipe.attack, "triangle:1")) for tier in tiers]
    right = np.ones(20, bool)
    settings = {condition.name: condition.settings for condition in own}
    nested = {
        (c.name, c.settings): right for conditions in smaller for c in conditions if settings[c.name] != c.settings
    }
    verdicts = {"clean": right, **dict.fromkeys(settings, right), "worst": right}
    return Reference(np.zeros(20, np.uint64), {}, verdicts, settings, nested)


def test_only_like_is_compared_with_like() -> None:
    """A reference that met other steps, or more queries, says nothing of the weaker attack."""
    recipe = Recipe()
    assert comparable("commit", met(["commit"], recipe), recipe).alone == ()
    release = comparable("commit", met(["release"], recipe), recipe)
    assert release.alone == ("mpd-apgd", "square")  # more steps of MPD-APGD, more queries
    assert release.missing == ()
    assert "worst" in release.names  # over the attacks that both met


def test_references_nest() -> None:
    """What was exported for a release can be validated with each smaller tier, all of it compared."""
    recipe = Recipe()
    tiers = list(TIERS)
    for place, tier in enumerate(tiers):
        reference = met(tiers, recipe) if tier != tiers[-1] else met([tier], recipe)
        assert comparable(tier, reference, recipe).alone == (), (place, tier)


def test_a_reference_that_met_other_settings_supports_no_verdict() -> None:
    recipe = Recipe()
    reference = met(["commit"], recipe)
    weaker = recipe.model_copy(update={"attack": recipe.attack.model_copy(update={"eps": 0.01})})
    assert "pgd-strong" in comparable("commit", reference, weaker).missing
    old = reference._replace(settings={})
    assert comparable("commit", old, recipe).names == ["clean"]


def test_the_tier_is_the_callers_or_the_gates_or_the_references() -> None:
    recipe = Recipe()
    assert chosen_tier("paper", Gate(tier="release"), recipe, "commit") == ("paper", "the caller")
    assert chosen_tier(None, Gate(tier="release"), recipe, "commit") == ("release", "the gate")
    assert chosen_tier(None, Gate(max_drop=0.1), recipe, "paper") == ("paper", "the bundle's reference")
    assert chosen_tier(None, None, recipe, None) == ("commit", "the recipe")
    with pytest.raises(InputError, match="gate requires tier release, and tier commit has weaker attacks"):
        chosen_tier("commit", Gate(tier="release"), recipe, "release")


def test_a_gate_that_bounds_no_drop_has_the_least_that_its_images_can_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT", SIGNIFICANT)
    assert settled(Gate(), "release", 1000).max_drop == 0.01
    few = settled(Gate(), "release", 497)
    assert few.max_drop == pytest.approx(10 / 497)
    check_gate(few, NAMES, 497, NAMES)
    stated = {rule.name: rule for rule in stated_rules(None, few, Recipe(), tier_from="it", data="cifar10", n=497)}
    assert stated["max drop"].value == "2.01%"
    assert stated["max drop"].origin == "the smallest drop that 497 images can decide; tier release allows 1.00%"
    assert settled(Gate(max_drop=0.005), "release", 497).max_drop == 0.005  # and is refused, as it cannot be decided


@pytest.mark.parametrize("n", [0, 1, 10, 99])
@pytest.mark.parametrize("tier", TIERS)
def test_too_few_images_are_not_given_a_limit_that_decides_nothing(
    n: int, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT", SIGNIFICANT)
    with pytest.raises(InputError, match=rf"{n} images cannot decide this gate, which needs 100 "):
        check_gate(settled(Gate(), tier, n), NAMES, n, NAMES)


def test_every_rule_says_where_it_comes_from() -> None:
    recipe = Recipe(gate=Gate(floors={"clean": 0.9}))

    def origins(given: Gate | None, data: str = "cifar10") -> dict[str, str]:
        rules = settled(given or recipe.gate, "commit", 1000)
        return {r.name: r.origin for r in stated_rules(given, rules, recipe, tier_from="x", data=data, n=1000)}

    assert origins(None) == {"tier": "x", "max drop": "tier commit", "floor of clean": "the recipe"}
    assert origins(None, "digits")["floor of clean"] == "the recipe, which is for cifar10"
    assert "not applied" in origins(Gate(max_drop=0.1))["floor of clean"]
    assert origins(Gate(max_drop=0.1))["max drop"] == "the gate"


@pytest.mark.parametrize(
    ("pinned", "expected"),
    [
        ({"eps": 0.1}, "for attacks with eps 0.1, the bundle's recipe has 0.0313725"),
        ({"images_sha256": "ab"}, "for images with sha256 ab, and these have cd"),
        ({"least_images": 1000}, "requires at least 1000 images, not 100"),
    ],
)
def test_a_gate_pins_what_its_figures_were_chosen_for(pinned: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check_pins(Gate(**pinned), Recipe(), "cd", 100)
    check_pins(Gate(eps=8 / 255, images_sha256="cd", least_images=100), Recipe(), "cd", 100)


def test_gate_files(tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text(
        'tier = "paper"\nimages = 300\nmax_drop = "1/50"\ndrops = { clean = "1/200", pgd = 0 }\nfloors.worst = 0.3'
    )
    expected = {"tier": "paper", "images": 300, "max_drop": 0.02}
    assert load_gate(file) == Gate(**expected, drops={"clean": 0.005, "pgd": 0.0}, floors={"worst": 0.3})
    file.write_text("")
    assert load_gate(file) == Gate()
    tiers = {path.name: load_gate(path).tier for path in GATES.glob("*.toml")}
    assert tiers == {"events.toml": "commit", "strict.toml": "release"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_dorp = 0.5", "unknown key 'max_dorp'"),
        ("max_drop = 2", "max_drop"),
        ("max_drop = 1", "write 0.01 for 1 %"),
        ("drops = { clean = 1 }", "write 0.01 for 1 %"),
        ("floors = { clean = 0 }", r"floors\.clean"),
        ("max_drop = -0.1", "max_drop"),
        ("max_drop = nan", "max_drop"),
        ('max_drop = "1/0"', "max_drop"),
        ('drops = { clean = "a lot" }', r"drops\.clean"),
        ("floors = { worst = 1.5 }", r"floors\.worst"),
        ("floors = 0.5", "floors"),
        ('tier = "weekly"', "tier"),
        ("images = 0", "images"),
        ("images = 20.5", "images"),
        ("=", "not a TOML file"),
    ],
)
def test_gate_files_that_are_none_are_one_line(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_text(text)
    with pytest.raises(InputError, match=expected) as error:
        load_gate(tmp_path / "gate.toml")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="cannot read"):
        load_gate(tmp_path / "none.toml")
