"""The controller of eta: on simulated plants, on real runs, and on what it is given by mistake."""

import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import small_recipe

from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.defences import make_defences
from mpdsgr_deploy.defences.eta import LARGEST_STEP, RANGE, next_eta, step_to_omega, step_within_drop
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe, load_recipe
from mpdsgr_deploy.recipes import find_recipe
from mpdsgr_deploy.training import train, training_run
from mpdsgr_deploy.training.epoch import cosine

EPOCHS = 20


def simulate(plant: Callable[[float, float, int], float], target: float, noise: float = 0.005) -> list[float]:
    """Omega of each epoch of a plant (Omega before, eta, epoch) -> Omega under the controller that sees it noisily."""
    draw = random.Random(0)
    omega, eta = 0.44, 0.5
    omegas, seen = [], []
    for epoch in range(EPOCHS):
        omega = plant(omega, eta, epoch)
        omegas.append(omega)
        seen.append(omega * math.exp(draw.gauss(0, noise)))
        eta = next_eta(eta, step_to_omega(seen, target))
    return omegas


@pytest.mark.parametrize("target", [0.15, 0.3])
@pytest.mark.parametrize("lag", [0.0, 0.4])
@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.7])
def test_settles_where_omega_follows_eta(exponent: float, lag: float, target: float) -> None:
    """A long epoch: Omega is a falling function of eta, reached at once or nearly so."""
    omegas = simulate(lambda omega, eta, _: lag * omega + (1 - lag) * 0.47 / (1 + (eta / 0.5) ** exponent), target)
    assert omegas[-4:] == pytest.approx([target] * 4, rel=0.08)


@pytest.mark.parametrize("target", [0.2, 0.3])
@pytest.mark.parametrize("strength", [0.05, 0.1])
@pytest.mark.parametrize("restoring", [0.05, 0.1, 0.2])
def test_settles_where_eta_sets_the_pace(restoring: float, strength: float, target: float) -> None:
    """A short epoch under a decaying learning rate: eta drives Omega down, the cross-entropy slowly brings it back."""

    def plant(omega: float, eta: float, epoch: int) -> float:
        for step in range(epoch * 20, epoch * 20 + 20):
            lr = cosine(1.0, step, EPOCHS * 20) / 20
            omega += lr * (restoring * (0.47 - omega) - strength * eta * omega)
        return omega

    assert simulate(plant, target)[-1] == pytest.approx(target, rel=0.08)


def test_a_budget_of_accuracy_is_spent_and_not_exceeded() -> None:
    """The drop grows as a power of eta, seen through the noise of 1,000 validation images."""
    draw = random.Random(0)
    eta, seen, true = 0.5, [], []
    for _ in range(EPOCHS):
        true.append(0.002 * eta)
        seen.append(true[-1] + draw.gauss(0, 0.003))
        eta = next_eta(eta, step_within_drop(seen, 0.01))
    assert sum(true[-6:]) / 6 == pytest.approx(0.01, rel=0.25)
    assert max(true) < 0.02


def test_steps_and_eta_are_bounded() -> None:
    assert step_to_omega([0.4], 1e-3) == step_within_drop([-0.5], 0.01) == LARGEST_STEP
    assert step_to_omega([0.0], 0.4) == step_within_drop([0.9], 0.01) == -LARGEST_STEP
    assert step_to_omega([0.2], 0.2) == step_within_drop([0.02, 0.0, 0.01], 0.01) == 0
    assert (next_eta(RANGE[0], -0.5), next_eta(RANGE[1], 0.5)) == RANGE


def budgeted(epochs: int = 3, **settings: object) -> Recipe:
    return small_recipe(training={"epochs": epochs}, defence={"mpd-sgr": {"estimator": "empirical", **settings}})


def test_a_real_run_meets_its_target(tmp_path: Path) -> None:
    target = 0.15
    recipe = budgeted(EPOCHS, target_omega=target)
    half = recipe.data.model_copy(update={"train_images": 585})
    train(recipe.model_copy(update={"data": half}), tmp_path / "run")
    history = load_checkpoint(tmp_path / "run" / "last").history
    assert history[-1]["omega"] == pytest.approx(target, rel=0.12)
    assert history[0]["omega_weight"] == pytest.approx(0.5)
    assert abs(math.log(history[-1]["omega_weight"] / 0.5)) > 0.2  # where it started, Omega would be another one
    for before, after in pairwise(history):
        assert abs(math.log(after["omega_weight"] / before["omega_weight"])) <= LARGEST_STEP + 1e-6
        weighted = after["omega_weight"] * after["omega"]
        assert after["loss"] == pytest.approx(after["cross_entropy"] + weighted, rel=1e-3)


@pytest.mark.parametrize("budget", ["target_omega", "max_drop"])
def test_an_interrupted_run_repeats_its_etas(
    budget: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = budgeted(target_omega=0.2) if budget == "target_omega" else budgeted(max_drop=0.1, reference=str(run_dir))
    if budget == "target_omega":
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_images": 260})})
    train(recipe, tmp_path / "whole")
    validate_epoch = training_run.validate_epoch

    def interrupted(*arguments: object) -> object:
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return validate_epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "validate_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "parts")
    train(recipe, tmp_path / "parts", resume=True)
    whole, parts = (
        [
            {**entry, "seconds": 0, "cpu_seconds": 0, "peak_mib": 0}
            for entry in load_checkpoint(tmp_path / name / "last").history
        ]
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert len({entry["omega_weight"] for entry in whole}) == 3


def test_the_drop_is_counted_from_the_reference_at_the_same_epoch(run_dir: Path) -> None:
    (defence,) = make_defences(budgeted(max_drop=0.02, reference=str(run_dir)))
    reference = [entry["validation_accuracy"] for entry in load_checkpoint(run_dir / "last").history]
    history = [{"validation_accuracy": r - 0.02 - 0.01 * i, "omega_weight": 3.0} for i, r in enumerate(reference[:2])]
    defence.begin_epoch([])
    assert defence.eta == 0.5
    defence.begin_epoch(history)
    assert defence.eta == pytest.approx(3.0 * 2 ** (1 - 0.025 / 0.02))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_omega": 0.2, "max_drop": 0.01, "reference": "runs/digits-reg"}, "give one of them"),
        ({"max_drop": 0.01}, "belong together"),
        ({"reference": "runs/digits-reg"}, "belong together"),
        ({"target_omega": 0.2, "eta": 0}, "eta must start above 0"),
        ({"target_omega": 1.5}, "target_omega.*less than 1"),
        ({"measure": "gradient"}, "unknown measure 'gradient'; allowed: expected-gradient, overlap"),
    ],
)
def test_contradictory_settings(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        make_defences(budgeted(**settings))


def test_a_reference_that_does_not_fit_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    settings = {"max_drop": 0.01, "reference": str(run_dir)}
    other_images = budgeted(**settings).model_dump() | {"data": {"name": "digits", "validation_share": 0.2}}
    for recipe, expected in (
        (budgeted(max_drop=0.01, reference=str(tmp_path)), "is not a training run"),
        (budgeted(4, **settings), "has 3 epochs and this run 4"),
        (Recipe.model_validate(other_images), r"has other values of data\.validation_share"),
    ):
        with pytest.raises(InputError, match=expected) as error:
            train(recipe, tmp_path / "run")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run" / "state.pt").exists()


def test_the_controllers_recipes_differ_in_the_defence_alone() -> None:
    base = load_recipe(find_recipe("digits-mpdsgr"))
    for recipe in (load_recipe(find_recipe(f"digits-mpdsgr-{name}")) for name in ("auto", "drop")):
        make_defences(recipe)
        assert recipe.model_copy(update={"defence": base.defence}) == base
