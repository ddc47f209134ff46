"""What a report says beside `worst`: masking by nature, and how far a quick tier's union lies above a longer one's."""

from types import SimpleNamespace

import numpy as np
import pytest

from mpdsgr_deploy.attacks.condition import CLEAN, STRONG, WORST
from mpdsgr_deploy.attacks.suite_measurement import Measurement, Stopped
from mpdsgr_deploy.validation.comparison import Comparison
from mpdsgr_deploy.validation.health.check_registry import Convergence
from mpdsgr_deploy.validation.remarks import remarks

N = 20


def first(count: int) -> np.ndarray:
    """Verdicts on N images: the first `count` are right."""
    return np.arange(N) < count


def measured(strong: int, worst: int, stopped: Stopped | None = None) -> Measurement:
    y = np.zeros(N, np.int64)
    outcome = SimpleNamespace(condition=SimpleNamespace(name=STRONG), correct=first(strong))
    return Measurement(y, y, (outcome,), first(worst), stopped)


def subject(
    tier: str = "release", exported: str = "release", here: int = 9, there: int = 9, **other: object
) -> SimpleNamespace:
    promise = SimpleNamespace(tier=exported)
    verdicts = {CLEAN: first(N), "square": first(here)}
    fields = {"own": object(), "data": "digits", **other}
    return SimpleNamespace(
        **fields,
        target=SimpleNamespace(bundle=SimpleNamespace(manifest=SimpleNamespace(reference=promise))),
        gate=SimpleNamespace(tier=tier),
        images=range(N),
        reference=SimpleNamespace(verdicts={WORST: first(there)}),
        comparison=Comparison(verdicts, attacks=("square",)),
    )


def test_a_gap_between_the_trained_surrogate_and_all_attacks_is_reported() -> None:
    (masked,) = remarks(subject("release", "release", 9, 9), measured(strong=15, worst=9))
    assert "75.0% of 20 images are correct, after all attacks together 45.0%" in masked
    assert "by 30.0 points" in masked
    assert remarks(subject("release", "release", 9, 9), measured(strong=10, worst=9)) == []


@pytest.mark.parametrize("exported", ["release", "paper"])
def test_a_quick_tier_says_by_how_much_a_longer_one_went_below_it(exported: str) -> None:
    (bound,) = remarks(subject("commit", exported, here=12, there=10), measured(strong=10, worst=10))
    assert "at export 12 of these 20 images were correct after the attacks of tier commit" in bound
    assert f"after those of tier {exported} 10" in bound


def test_without_a_longer_tier_at_export_it_says_how_to_learn() -> None:
    (bound,) = remarks(subject("commit", "commit", 12, 12), measured(strong=10, worst=10))
    assert "upper bound" in bound
    assert "--tier release" in bound


def test_nothing_is_said_of_a_measurement_that_stopped_early() -> None:
    stopped = Stopped(STRONG, WORST, "too few")
    assert remarks(subject("commit", "release", 12, 10), measured(strong=20, worst=3, stopped=stopped)) == []


@pytest.mark.parametrize(("data", "known"), [("imagefolder", False), ("digits", True)])
def test_images_that_nothing_can_be_compared_with_are_said_to_be_the_bundles_own_word(data: str, known: bool) -> None:
    stopped = Stopped(STRONG, WORST, "too few")
    (own_word,) = remarks(subject(own=None, data=data), measured(strong=10, worst=9, stopped=stopped))
    assert "come from the bundle and were not verified" in own_word
    assert "--root" in own_word
    assert ("beyond the first 100" in own_word) == known


def test_a_worst_that_twice_the_steps_lower_says_by_how_much() -> None:
    plain = subject("release", "release", 9, 9), measured(strong=10, worst=9)
    converged = Convergence(0, 9, N, {"mpd-apgd": 100}, worst=9 / N)
    assert remarks(*plain, converged) == []
    (lowered,) = remarks(*plain, converged._replace(broken=2))
    assert "mpd-apgd with twice the steps break 2 of the 9 images that were still correct (10.0 points)" in lowered
