"""The gate against brute force: every outcome of few images, judged by exact arithmetic and by scipy's tests."""

from collections.abc import Iterator
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from coarse_gates import coarse
from scipy.stats import binomtest, permutation_test

from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation import gate as rules_of_the_gate
from mpdsgr_deploy.validation.gate import (
    SIGNIFICANT,
    SIGNIFICANT_OVERALL,
    failures,
    fewest_flips,
    fewest_images,
    least_decidable,
    lost,
    regressed,
)
from mpdsgr_deploy.validation.proportions import binomial_tail, refused, sign_flip_tail, smallest_drop, wilson
from mpdsgr_deploy.validation.rows import Row

SHARES = ["0", "0.01", "0.05", "0.1", "0.15", "1/3", "0.35", "0.5", "0.7", "0.8", "0.9", "0.95"]


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
        "clean: of 100 images 6 are newly wrong and 0 newly right, a drop of 6.00%, where 5.00% is allowed",
        "fgsm: of 100 images 11 are newly wrong and 0 newly right, a drop of 11.00%, where 10.00% is allowed",
        "fgsm: accuracy 89.00% is below the floor 90.00%",
        "pgd: of 100 images 51 are newly wrong and 0 newly right, a drop of 51.00%, where 50.00% is allowed",
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
        "attack 0: a drop of 7.00%, where 5.00% is allowed; "
        "statistically significant over 5 conditions together, p = 4e-08"
    ]
    assert failures(gate("0.05"), rows_with_losses(1, worse=8, better=1)) == []  # one alone is not
    assert failures(gate("0.08"), rows_with_losses(5, worse=8, better=1)) == []  # within the limit
    assert failures(gate("0.01"), rows_with_losses(5, worse=8, better=6)) == []  # chance
    first, *others = rows_with_losses(5, worse=8, better=1)
    unbounded = [row.model_copy(update={"name": "square"}) for row in others]
    assert failures(gate("0.05"), [first, *unbounded]) == []  # what has no limit does not count
