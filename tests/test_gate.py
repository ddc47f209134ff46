"""The gate against brute force: every outcome of few images, judged by exact arithmetic and by scipy's tests."""

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import TIERS, resolved
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Gate, Recipe
from mpdsgr_deploy.reference import Reference
from mpdsgr_deploy.validation import gate as rules_of_the_gate
from mpdsgr_deploy.validation.comparison import Comparison, compare_conditions
from mpdsgr_deploy.validation.gate import (
    SIGNIFICANT,
    SIGNIFICANT_OVERALL,
    check_gate,
    failures,
    fewest_flips,
    fewest_images,
    least_decidable,
    load_gate,
    lost,
    regressed,
)
from mpdsgr_deploy.validation.power import refused, smallest_drop
from mpdsgr_deploy.validation.proportions import binomial_tail, sign_flip_tail, wilson
from mpdsgr_deploy.validation.rows import Row
from mpdsgr_deploy.validation.rules import check_pins, chosen_tier, settled, stated_rules

GATES = Path(__file__).parent.parent / "export" / "gates"
SHARES = ["0", "0.01", "0.05", "0.1", "0.15", "1/3", "0.35", "0.5", "0.7", "0.8", "0.9", "0.95"]


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that so few images can decide as can be tried out one by one: p < 0.05, five flips."""
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT", 0.05)
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT_OVERALL", 0.05)


def test_each_tier_can_decide_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT", SIGNIFICANT)
    for tier in TIERS.values():
        assert tier.images is None or least_decidable(tier.images) <= tier.max_drop


@pytest.mark.parametrize("p", [0.05, 0.003, 0.001, 0.0005])
def test_the_fewest_flips_are_significant_and_one_less_are_not(p: float) -> None:
    assert 2.0 ** -fewest_flips(p) < p <= 2.0 ** (1 - fewest_flips(p))


@pytest.mark.parametrize(("n", "allowed"), [(100, 0.1), (300, 0.034), (350, 0.03), (1000, 0.01)])
@pytest.mark.parametrize("flips", [0.01, 0.03, 0.06, 0.1])
def test_a_healthy_artefact_is_refused_less_than_once_in_a_hundred_times(n: int, allowed: float, flips: float) -> None:
    """The probabilities of all conditions added up bound that of any, however they hang together."""
    attacks = len(TIERS["release"].entries) - 3  # without Square, which has no rule, and transfers, which need a sender
    overall = refused(n, allowed, flips, 0.0, SIGNIFICANT_OVERALL)
    assert 2 * overall + attacks * refused(n, allowed, flips, 0.0, SIGNIFICANT) < 0.01


def test_power_is_that_of_a_simulation() -> None:
    n, flips, drop, allowed, p = 300, 0.03, 0.08, 0.03, 0.003
    rng = np.random.default_rng(0)
    seen = rng.multinomial(n, [flips + drop, flips, 1 - 2 * flips - drop], size=4000)
    refusals = [w - b > allowed * n + 1e-9 and binomial_tail(int(w), int(w + b)) < p for w, b, _ in seen]
    assert refused(n, allowed, flips, drop, p) == pytest.approx(np.mean(refusals), abs=0.03)


def test_the_smallest_drop_is_refused_nine_times_in_ten() -> None:
    drop = smallest_drop(350, 0.03, 10, 10, 0.003)
    assert refused(350, 0.03, 10 / 350, drop, 0.003) == pytest.approx(0.9, abs=0.01)
    assert smallest_drop(1000, 0.01, 30, 30, 0.003) < smallest_drop(350, 0.03, 10, 10, 0.003)
    assert smallest_drop(5, 0.9, 0, 0, 0.003) is None


@cache
def chance(worse: int, better: int) -> bool:
    """Whether as many images newly wrong, of the discordant ones, are no surprise."""
    return not worse + better or binomtest(worse, worse + better, alternative="greater").pvalue >= 0.05


def too_far(share: str, n: int, worse: int, better: int) -> bool:
    return Fraction(worse - better, n) > Fraction(share) and not chance(worse, better)


def gate(share: str = "0.99", floor: str | None = None, name: str = "pgd") -> Gate:
    floors = {} if floor is None else {name: float(Fraction(floor))}
    return Gate(max_drop=float(Fraction(share)), floors=floors)


@pytest.mark.parametrize("share", SHARES)
def test_a_regression_is_more_than_allowed_and_no_chance(share: str) -> None:
    for n in (5, 10, 20, 60):
        outcomes = [(worse, better) for worse in range(n + 1) for better in range(n + 1 - worse)]
        found = {pair: regressed(gate(share), "pgd", n, *pair) for pair in outcomes}
        assert found == {pair: too_far(share, n, *pair) for pair in outcomes}


@pytest.mark.parametrize("share", SHARES)
def test_the_fewest_images_that_decide_a_drop(share: str) -> None:
    """From there on, every drop above the limit is significant if all flips go one way; above none at all, some is."""

    def decides(n: int) -> bool:
        excess = [worse for worse in range(n + 1) if Fraction(worse, n) > Fraction(share)]
        decided = [too_far(share, n, worse, 0) for worse in excess]
        return any(decided) if share == "0" else all(decided)

    fewest = fewest_images(gate(share), ["pgd"])
    assert fewest == next(n for n in range(1, 1000) if decides(n))
    assert all(decides(n) for n in range(fewest, fewest + 50))


@pytest.mark.parametrize("floor", ["0.1", "0.5", "0.9", "0.97", "0.999"])
def test_the_fewest_images_that_prove_a_floor(floor: str) -> None:
    proved = (n for n in range(1, 10_000) if wilson(n, n)[0] >= float(floor))
    assert fewest_images(gate("0.99", floor), []) == next(proved)


def test_the_fewest_images_are_those_of_the_hardest_rule() -> None:
    rules = Gate(max_drop=0.1, drops={"clean": 0.01, "pgd": 0.99}, floors={"worst": 0.6})
    assert fewest_images(rules, ["clean", "pgd", "worst"]) == 400
    assert fewest_images(rules, ["pgd", "worst"]) == 40
    assert fewest_images(rules, ["pgd"]) == 6  # the floor's
    assert fewest_images(Gate(max_drop=0.1), ["square"]) == 1  # decided in the worst case
    assert fewest_images(Gate(drops={"square": 0.1}), ["square"]) == 40


def outcomes(n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Verdicts of the artefact [m] and of the reference [n], up to the order of images, for all m <= n."""
    for m in range(n + 1):
        for both in range(m + 1):
            for worse in range(m + 1 - both):
                for better in range(m + 1 - both - worse):
                    neither = m - both - worse - better
                    for right in range(n - m + 1):
                        reference = [1] * (both + worse) + [0] * (better + neither)
                        artefact = [1] * both + [0] * worse + [1] * better + [0] * neither
                        left = [1] * right + [0] * (n - m - right)
                        yield np.array(artefact, bool), np.array([*reference, *left], bool)


@pytest.mark.parametrize("share", ["0", "0.15", "1/3", "0.5"])
@pytest.mark.parametrize("floor", [None, "0.3", "0.7", "1"])
def test_lost_means_that_no_completion_passes(share: str, floor: str | None) -> None:
    n, rules, counts = 8, gate(share, floor), {True: 0, False: 0}
    for artefact, reference in outcomes(n):
        m = len(artefact)
        worse, better = int((reference[:m] & ~artefact).sum()), int((artefact & ~reference[:m]).sum())
        right = int(reference[m:].sum())
        passes = any(
            not too_far(share, n, worse + lose, better + win)
            and (floor is None or Fraction(int(artefact.sum()) + right - lose + win, n) >= Fraction(floor))
            for lose in range(right + 1)
            for win in range(n - m - right + 1)
        )
        assert (lost(rules, "pgd", artefact, reference, n) is None) is passes
        counts[passes] += 1
    assert counts[True] > 0
    assert counts[False] > 0


def test_lost_is_final_what_failures_says_of_all_images() -> None:
    rules = gate("0.15", "0.4")
    for artefact, reference in outcomes(7):
        if len(artefact) == 7:
            row = Row.of("pgd", "", artefact, reference=reference)
            assert bool(lost(rules, "pgd", artefact, reference, 7)) is bool(failures(rules, [row]))


def test_lost_without_a_reference_knows_floors_alone() -> None:
    rules = gate("0", "0.5")
    assert lost(rules, "pgd", np.zeros(4, bool), None, 10) is None
    told = lost(rules, "pgd", np.zeros(6, bool), None, 10)
    assert told == "after 6 of 10 images the floor 50.00% cannot be reached any more"
    assert lost(rules, "fgsm", np.zeros(6, bool), None, 10) is None


def row(name: str, right: int, n: int = 100, *, of: int = 100) -> Row:
    """The first `right` of n images right, those of the reference the first `of`."""
    places = np.arange(n)
    return Row.of(name, "", places < right, reference=places < of)


def test_rules_of_single_conditions_go_before_the_general_one() -> None:
    rules = Gate(max_drop=0.1, drops={"clean": 0.05, "pgd": 0.5}, floors={"fgsm": 0.9})
    assert failures(rules, [row("clean", 95), row("fgsm", 90), row("pgd", 50)]) == []
    broken = failures(rules, [row("clean", 94), row("fgsm", 89), row("pgd", 49)])
    assert [reason.line for reason in broken] == [
        "clean: 6 images newly wrong and 0 newly right of 100, a drop of 6.00%; 5.00% allowed",
        "fgsm: 11 images newly wrong and 0 newly right of 100, a drop of 11.00%; 10.00% allowed",
        "fgsm: accuracy 89.00% is below the floor 90.00%",
        "pgd: 51 images newly wrong and 0 newly right of 100, a drop of 51.00%; 50.00% allowed",
    ]
    alone = row("fgsm", 89).model_copy(update={"reference": None, "flips": None})
    assert len(failures(rules, [alone])) == 1  # the floor


def test_paired_verdicts_decide_not_percentages() -> None:
    """50 images newly wrong and 44 newly right are a drop of 6 %, and chance."""
    places = np.arange(100)
    swapped = Row.of("pgd", "", places >= 50, reference=places < 56)
    assert (swapped.flips.newly_wrong, swapped.flips.newly_right) == (50, 44)
    assert failures(gate("0"), [swapped]) == []


def test_a_condition_that_was_cut_short_is_not_judged() -> None:
    """Of 20 images 15 are right, 75 %, but all of the 80 that were left out may be."""
    rules = gate("0.1", "0.9", name="fgsm")
    assert failures(rules, [row("clean", 100), row("fgsm", 15, 20, of=20)]) == []
    assert len(failures(rules, [row("clean", 100), row("fgsm", 75)])) == 2


def test_the_permutation_test_is_scipys_and_mcnemar_for_single_conditions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        differences = rng.integers(-3, 4, 12)
        exact = permutation_test(
            (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="greater"
        )
        assert sign_flip_tail(differences) == pytest.approx(exact.pvalue)
    assert sign_flip_tail(np.array([1] * 9 + [-1] * 2 + [0] * 4)) == pytest.approx(binomial_tail(9, 11))
    assert sign_flip_tail(np.zeros(5, np.int64)) == 1
    assert sign_flip_tail(np.zeros(0, np.int64)) == 1


def rows_with_losses(conditions: int, worse: int, better: int) -> list[Row]:
    """Under each condition other images are newly wrong and newly right; the reference has 50 of 100 right."""
    made = []
    for i in range(conditions):
        reference = np.arange(100) % 2 == 0
        artefact = reference.copy()
        artefact[np.flatnonzero(reference)[i * worse : (i + 1) * worse]] = False
        artefact[np.flatnonzero(~reference)[i * better : (i + 1) * better]] = True
        made.append(Row.of(f"attack {i}", "", artefact, reference=reference))
    return made


def test_losses_too_few_in_each_condition_are_significant_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT", SIGNIFICANT)
    broken = failures(gate("0.05"), rows_with_losses(5, worse=8, better=1))
    assert [reason.line for reason in broken] == [
        "attack 0: a drop of 7.00%; 5.00% allowed; significant in 5 conditions together, p = 4e-08"
    ]
    assert failures(gate("0.05"), rows_with_losses(1, worse=8, better=1)) == []  # one alone is not
    assert failures(gate("0.08"), rows_with_losses(5, worse=8, better=1)) == []  # within the limit
    assert failures(gate("0.01"), rows_with_losses(5, worse=8, better=6)) == []  # chance
    first, *others = rows_with_losses(5, worse=8, better=1)
    unbounded = [row.model_copy(update={"name": "square"}) for row in others]
    assert failures(gate("0.05"), [first, *unbounded]) == []  # what has no limit does not count


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
            "bounds the drop under 'pgd', which the bundle's reference has not",
        ),
        (Gate(drops={"pgd": 0.1}, floors={"pgd": 0.1}), 100, (), "bounds the drop under 'pgd'"),
        (Gate(), 100, (), "nothing to decide"),
        (Gate(max_drop=0.05), 79, NAMES, "79 images cannot decide this gate: it takes 80"),
        (Gate(max_drop=0.0), 4, NAMES, "it takes 5"),
        (Gate(floors={"worst": 0.9}), 34, (), "it takes 35"),
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
    with pytest.raises(InputError, match="gate asks for tier release, and tier commit attacks less"):
        chosen_tier("commit", Gate(tier="release"), recipe, "release")


def test_a_gate_that_bounds_no_drop_has_the_least_that_its_images_can_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT", SIGNIFICANT)
    assert settled(Gate(), "release", 1000).max_drop == 0.01
    few = settled(Gate(), "release", 497)
    assert few.max_drop == pytest.approx(10 / 497)
    check_gate(few, NAMES, 497, NAMES)
    stated = {rule.name: rule for rule in stated_rules(None, few, Recipe(), tier_from="it", data="cifar10", n=497)}
    assert stated["max drop"].value == "2.01%"
    assert stated["max drop"].origin == "the least that 497 images can decide; tier release asks for 1.00%"
    assert settled(Gate(max_drop=0.005), "release", 497).max_drop == 0.005  # and is refused, as it cannot be decided


@pytest.mark.parametrize("n", [0, 1, 10, 99])
@pytest.mark.parametrize("tier", TIERS)
def test_too_few_images_are_not_given_a_limit_that_decides_nothing(
    n: int, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules_of_the_gate, "SIGNIFICANT", SIGNIFICANT)
    with pytest.raises(InputError, match=rf"{n} images cannot decide this gate: it takes 100 "):
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
        ({"images_sha256": "ab"}, "for the images with sha256 ab, these have cd"),
        ({"least_images": 1000}, "asks for 1000 images or more, not 100"),
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
