"""Each health check of a validation flags the fault that it is for, and no other."""

from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import binomtest

from mpdsgr_deploy.attacks.condition import Batch
from mpdsgr_deploy.attacks.conditions import FGSM
from mpdsgr_deploy.attacks.counting import CountedGradients, GradientCounts
from mpdsgr_deploy.attacks.suite_measurement import budget_faults, rounded_to_bytes
from mpdsgr_deploy.attacks.tiers import BY_STRENGTH
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Array, Gradient
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.validation import Target
from mpdsgr_deploy.validation.health import artefact as artefact_checks
from mpdsgr_deploy.validation.health import attacks as attack_checks
from mpdsgr_deploy.validation.health.check_registry import Convergence, Reach, Search
from mpdsgr_deploy.validation.proportions import exceeds
from mpdsgr_deploy.validation.rows import VerdictFlips


@pytest.mark.parametrize(("k", "n", "share"), [(0, 50, 0.01), (4, 50, 0.01), (7, 200, 0.01), (50, 50, 0.9)])
def test_exceeds_against_scipy(k: int, n: int, share: float) -> None:
    assert exceeds(k, n, share) == pytest.approx(binomtest(k, n, share, alternative="greater").pvalue, abs=1e-12)


def test_check_1_flags_images_that_cheat() -> None:
    clean = np.full((2, 1, 2, 2), 0.5, np.float32)
    assert budget_faults("a", clean, clean + np.float32(0.1), 0.1) == []
    assert budget_faults("noise", clean, clean + np.float32(0.4), None) == []
    for images, expected in (
        (clean + np.float32(0.1001), "more than eps"),
        (clean + np.float32(0.6), "leaves"),
        (clean * np.float32(np.nan), "non-finite"),
    ):
        (fault,) = budget_faults("a", clean, images, 0.1)
        assert expected in fault
    assert not attack_checks.check_budget(["fault"], "rule").passed
    exact = np.random.default_rng(0).random((3, 1, 4, 4), np.float32)
    assert not rounded_to_bytes(exact)
    assert rounded_to_bytes(np.rint(exact * 255) / np.float32(255))


def verdicts(**broken: list[int]) -> dict[str, np.ndarray]:
    found = {name: np.ones(200, bool) for name in BY_STRENGTH}
    for name, indices in broken.items():
        found[name.replace("_", "-")][indices] = False
    found["worst"] = np.logical_and.reduce(list(found.values()))
    return found


def test_check_2_flags_a_stronger_attack_that_does_less() -> None:
    order = list(range(0, 100)), list(range(0, 120)), list(range(0, 150))
    assert attack_checks.check_order(verdicts(fgsm=order[0], pgd=order[1], pgd_strong=order[2])).passed
    assert attack_checks.check_order(
        verdicts(fgsm=order[0], pgd=[*range(3, 100)], pgd_strong=order[1])
    ).passed  # chance
    masked = attack_checks.check_order(verdicts(fgsm=order[1], pgd=order[0], pgd_strong=order[2]))
    assert not masked.passed
    assert "fgsm breaks 20" in masked.saw


def test_check_3_flags_a_network_that_the_blind_break_better() -> None:
    sound = verdicts(pgd_strong=list(range(100))) | {"square": np.arange(200) >= 40}
    masked = verdicts(pgd_strong=list(range(10))) | {"square": np.arange(200) < 150}
    assert attack_checks.check_black_box(sound, ["square"], ["pgd-strong"]).passed
    found = attack_checks.check_black_box(masked, ["square"], ["pgd-strong"])
    assert not found.passed
    assert "square breaks 50" in found.saw


def test_check_4_flags_accuracy_that_outlives_any_eps() -> None:
    falling = {eps: np.arange(100) < left for eps, left in ((0.0, 99), (0.1, 60), (0.5, 8), (1.0, 0))}
    assert attack_checks.check_growth(falling).passed
    assert not attack_checks.check_growth(falling | {1.0: np.arange(100) < 30}).passed
    rising = attack_checks.check_growth(falling | {0.5: np.arange(100) < 80})
    assert not rising.passed
    assert "eps 0.1 breaks" in rising.saw


def test_check_5_flags_an_attack_that_was_stopped_early() -> None:
    def passed(broken: int, floor: float | None = None) -> bool:
        seen = attack_checks.check_convergence(Convergence(broken, 40, 50, {"apgd-ce": 20}, 0.6, floor))
        assert f"{broken} more of 50" in seen.saw
        return seen.passed

    assert passed(0)
    assert passed(7)  # by chance one time in 85, where 5 % are left to break
    assert not passed(8)


@pytest.mark.parametrize(
    ("broken", "floor", "holds"), [(5, 0.5, True), (6, 0.5, False), (0, 0.6, True), (6, 0.7, True)]
)
def test_check_5_holds_a_floor_against_what_twice_the_steps_break(broken: int, floor: float, holds: bool) -> None:
    """A floor that the worst case itself misses is no matter of steps: the gate fails for it."""
    seen = attack_checks.check_convergence(Convergence(broken, 40, 50, {"apgd-ce": 20}, 0.6, floor))
    assert seen.passed == holds
    assert ("below the gate's floor" in seen.saw) != holds


def test_check_6_flags_a_sweep_that_left_something_out() -> None:
    done = ["triangle:0.25", "triangle:2.5", "rectangular:1", "adaptive"]
    assert attack_checks.check_sweep(done, "triangle:1").passed
    for missing in done:
        found = attack_checks.check_sweep([name for name in done if name != missing], "triangle:1")
        assert not found.passed
        assert missing in found.saw


class Planted:
    """A Differentiable whose gradient is zero for some samples and not finite for others."""

    def __init__(self, zero: int, bad: int) -> None:
        self.zero, self.bad = zero, bad

    def __call__(self, x: Array, y: Array) -> Gradient:
        gradient = np.ones_like(x)
        gradient[: self.zero] = 0
        gradient[self.zero : self.zero + self.bad, 0, 0, 0] = np.nan
        return Gradient(np.zeros((len(x), 2)), np.zeros(len(x)), gradient)


@pytest.mark.parametrize(("zero", "bad", "passed"), [(0, 0, True), (5, 0, True), (6, 0, False), (0, 1, False)])
def test_check_7_flags_gradients_that_vanish_or_explode(zero: int, bad: int, passed: bool) -> None:
    assert not attack_checks.check_gradients((0, 0, 0)).passed  # nothing asked
    counts = GradientCounts()
    counter = CountedGradients(Planted(zero, bad), counts)
    x = np.zeros((100, 1, 2, 2), np.float32)
    assert np.array_equal(counter(x, np.zeros(100)).logits, np.zeros((100, 2)))
    assert attack_checks.check_gradients(astuple(counts)).passed is passed


@pytest.mark.parametrize(("broken", "passed"), [(0, True), (11, True), (12, False)])
def test_check_19_flags_a_search_that_beats_the_gradients(broken: int, passed: bool) -> None:
    seen = attack_checks.check_search(Search(broken, 60, 100, 500))
    assert (seen.passed, seen.saw) == (
        passed,
        f"of 100 images attacks with gradients left 60 correct; of these 500 queries each break {broken}",
    )


def test_check_7_counts_vanishing_gradients_once_per_draw_as_it_counts_all_of_them() -> None:
    attack = FGSM(name="fgsm", eps=0.1, seed=0, steps=1, draws=4, surrogate="triangle:1")
    x = np.zeros((100, 1, 2, 2), np.float32)
    made = attack.attack(Planted(6, 0), Batch(x, np.zeros(100, np.int64), np.arange(100)), [])
    assert (made.evaluations, made.zero, made.not_finite) == (400, 24, 0)
    assert not attack_checks.check_gradients(made[1:]).passed


def test_check_8_flags_state_batch_dependence_and_a_process_that_disagrees(bundle: Bundle) -> None:
    x = load_test(bundle.manifest.recipe.data)[:64].unit()
    model = TorchModel.from_bundle(bundle)

    class Leaky:
        """Answers depend on the batch before."""

        last = 0.0

        def __call__(self, x: np.ndarray) -> np.ndarray:
            shift, self.last = self.last, float(x.mean())
            return model(x) + np.float32(shift)

    def batch_dependent(x: np.ndarray) -> np.ndarray:
        return model(x) - model(x).mean(0)

    def order_dependent(x: np.ndarray) -> np.ndarray:
        return model(x) + np.arange(len(x), dtype=np.float32)[:, None] * np.eye(1, 10, dtype=np.float32) * 9

    assert artefact_checks.check_function(model, x, model).passed
    assert "asked again" in artefact_checks.check_function(Leaky(), x, model).saw
    assert "in two batches" in artefact_checks.check_function(batch_dependent, x, batch_dependent).saw
    assert "in reverse order" in artefact_checks.check_function(order_dependent, x, order_dependent).saw
    stranger = artefact_checks.check_function(model, x, lambda x: model(x) * 2)
    assert not stranger.passed
    assert "in a fresh process" in stranger.saw

    def wrong_beyond_its_engine(x: np.ndarray) -> np.ndarray:
        return model(x)[::-1] if len(x) > 40 else model(x)

    assert artefact_checks.check_function(wrong_beyond_its_engine, x, batch_sizes=(20,)).passed
    assert "in a batch of 41" in artefact_checks.check_function(wrong_beyond_its_engine, x, batch_sizes=(20, 40)).saw

    class Counting:
        """One row of 32 drifts from call to call."""

        calls = 0

        def __call__(self, x: np.ndarray) -> np.ndarray:
            self.calls += 1
            return model(x) + np.eye(len(x), 10, dtype=np.float32)[:, :1] * np.float32(self.calls * 1e-3)

    assert "asked again" in artefact_checks.check_function(Counting(), x, model).saw
    gone = Target(Bundle(bundle.path / "nowhere", bundle.manifest)).fresh()
    assert artefact_checks.check_function(model, x, logits=model(x)).passed
    replaced = artefact_checks.check_function(model, x, logits=model(x) + np.float32(1e-3))
    assert "since the attacks began" in replaced.saw
    assert "it failed: error:" in artefact_checks.check_function(model, x, gone).saw
    assert compare(model(x[:5]), Target(bundle).fresh()(x[:5])).holds


def test_check_13_flags_an_artefact_that_gains_robustness() -> None:
    for worse, better, passed in ((0, 5, True), (4, 12, True), (0, 7, False), (2, 30, False), (30, 2, True)):
        flips = VerdictFlips(newly_wrong=worse, newly_right=better, p_value=1.0)
        assert attack_checks.check_reach(Reach(True, flips, allowed=0.05), 100).passed is passed
    assert attack_checks.check_reach(Reach(False), 100).state == "not compared"
    none, many = (VerdictFlips(newly_wrong=0, newly_right=k, p_value=1.0) for k in (0, 52))
    edited = attack_checks.check_reach(Reach(True, none, allowed=0.05, each={"fgsm": none, "pgd": many}), 100)
    assert (edited.passed, edited.saw) == (False, "under pgd 52 of 100 images newly right, 0 newly wrong")


def test_check_13_flags_a_reference_that_met_none_of_the_attacks() -> None:
    sound = VerdictFlips(newly_wrong=0, newly_right=0, p_value=1.0)
    assert attack_checks.check_reach(Reach(True), 100).failed
    found = attack_checks.check_reach(Reach(True, sound, missing=["pgd-strong"]), 100)
    assert found.failed
    assert "no results under pgd-strong" in found.saw
    part = attack_checks.check_reach(Reach(True, sound, alone=["apgd-ce"]), 100)
    assert part.passed
    assert "only the artefact was attacked with apgd-ce" in part.saw


def test_check_9_flags_an_empty_comparison() -> None:
    assert artefact_checks.check_compared(1, "the reference").passed
    assert not artefact_checks.check_compared(0, "the reference").passed
    assert not artefact_checks.check_compared(100, "").passed
    assert not compare(np.zeros((0, 10), np.float32), np.zeros((0, 10), np.float32)).holds


def test_check_12_flags_probabilities_and_counts() -> None:
    logits = np.random.default_rng(0).normal(size=(100, 10)).astype(np.float32)
    assert artefact_checks.check_logits(logits).passed
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert "probabilities" in artefact_checks.check_logits(softmax).saw
    assert "counts" in artefact_checks.check_logits(np.rint(logits * 4) / 4).saw
