"""How few time steps are enough, decided by images that flip in pairs."""

import numpy as np
import pytest
from test_steps import SHAPE, network

from mpdsgr_deploy.attacks.condition import CLEAN, WORST
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting import step_search
from mpdsgr_deploy.exporting.step_search import Flips, fewest_steps, least_images


def test_a_drop_is_ruled_out_by_paired_flips() -> None:
    least = least_images(0.02)
    assert least == 133
    assert Flips(0, 0, least).rule_out(0.02)
    assert not Flips(0, 0, least - 1).rule_out(0.02)
    assert not Flips(10, 0, 500).rule_out(0.02)  # what was seen is the drop itself
    assert Flips.of(np.array([True, True, False]), np.array([True, False, True])) == (1, 1, 3)
    assert Flips(2, 0, 500).rule_out(0.02)
    assert not Flips(32, 30, 500).rule_out(0.02)  # as small a difference, but of many flips


def test_a_true_drop_passes_in_a_twentieth_of_all_cases() -> None:
    draws = np.random.default_rng(0).multinomial(400, (0.06, 0.03, 0.91), 4000)
    wrongly = np.mean([Flips(lost, regained, 400).rule_out(0.03) for lost, regained, _ in draws.tolist()])
    assert 0.03 < wrongly < 0.065


def test_the_fewest_steps_are_chosen_by_clean_and_attacked_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = network("direct")
    images = load_training(recipe.data)[1][:100]
    lost = {2: {CLEAN: 1, WORST: 0}, 1: {CLEAN: 0, WORST: 9}}

    def verdicts(step: step_search.StepFile, images: object, of: str, unfinished: object) -> dict[str, np.ndarray]:
        missing = lost.get(step.recipe.encoding.T, {CLEAN: 0, WORST: 0})
        return {name: np.arange(100) >= count for name, count in missing.items()}

    monkeypatch.setattr(step_search.StepFile, "attacked", verdicts)
    chosen, record = fewest_steps(model, recipe, SHAPE, images, 0.06)
    assert chosen == 2
    assert [tried["within"] for tried in record["tried"]] == [True, False]
    assert record["tried"][1][WORST] == {"lost": 9, "regained": 0, "n": 100}
    assert record["images"] == "100 validation images of digits"
    with pytest.raises(InputError, match=r"a drop of 1\.00% takes 268 validation images, and there are 100"):
        fewest_steps(model, recipe, SHAPE, images, 0.01)
    with pytest.raises(InputError, match="between 0 and 1"):
        fewest_steps(model, recipe, SHAPE, images, 0)
