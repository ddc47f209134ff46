"""Attackers beyond plain PGD: expectation over noise, the attacker's surrogate, CW-L2, transfer, evaluation."""

import shutil
from dataclasses import replace
from pathlib import Path

import foolbox
import numpy as np
import pytest
import torch
from conftest import assert_input_error, mpdsgr_here, small_recipe

from mpdsgr_deploy.attacks import cw_l2, expectation, pgd
from mpdsgr_deploy.attacks.attacker_surrogate import AveragedBackward, RateBackward, with_surrogate
from mpdsgr_deploy.attacks.tiers import TierEntry, recipe_entries
from mpdsgr_deploy.attacks.torch_target import input_gradient, margin
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.protocols import Array, Gradient
from mpdsgr_deploy.recipe import SWEEP, Attack, Data, Gate, Recipe
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.snn import LIF
from mpdsgr_deploy.snn.surrogate import make_surrogate
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.training import train
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.evaluate import evaluate


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    images = load_test(Data(name="digits"))[:count]
    return images.unit(), images.classes


def test_expectation_averages_what_fresh_draws_give() -> None:
    values = iter(range(4))

    def noisy(x: Array, y: Array) -> Gradient:
        value = next(values)
        return Gradient(np.full((2, 3), value), np.full(2, 2 * value), np.full_like(x, 3 * value))

    found = expectation(noisy, 4)(np.zeros((2, 1, 1, 1)), np.zeros(2))
    assert [np.unique(part).tolist() for part in found] == [[1.5], [3.0], [4.5]]


class Plane:
    """Two classes, logits (0, w.x + b): the nearest image that fools it is the foot of the perpendicular."""

    def __init__(self, w: np.ndarray, b: float) -> None:
        self.w, self.b = w, b

    def value(self, x: np.ndarray) -> np.ndarray:
        return (x * self.w).sum((1, 2, 3)) + self.b

    def __call__(self, x: Array, y: Array) -> Gradient:
        value = self.value(x)
        sign = np.where(y == 1, -1.0, 1.0)  # margin: best wrong logit minus the true one
        gradient = sign[:, None, None, None] * np.broadcast_to(self.w, x.shape)
        return Gradient(np.stack([np.zeros_like(value), value], 1), sign * value, gradient)


def test_cw_finds_the_nearest_point_of_a_plane() -> None:
    rng = np.random.default_rng(0)
    plane = Plane(rng.normal(size=(1, 4, 4)), 0.0)
    x = rng.uniform(0.35, 0.65, (12, 1, 4, 4))
    plane.b = -float(np.median(plane.value(x)))
    y = (plane.value(x) > 0).astype(np.int64)
    found = cw_l2(plane, x, y, steps=200, searches=9, constant=0.01)
    distance = np.sqrt(((found - x) ** 2).sum((1, 2, 3)))
    nearest = np.abs(plane.value(x)) / np.linalg.norm(plane.w)
    assert ((plane.value(found) > 0) != y).all()
    assert (distance >= nearest - 1e-6).all()
    assert np.median(distance / nearest) < 1.05


def test_cw_is_as_near_as_foolboxs(bundle: Bundle) -> None:
    model, (x, y) = TorchModel.from_bundle(bundle), digits(16)
    found = cw_l2(model.attacker(loss=margin), x, y, steps=30, searches=3)
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=3, steps=30, stepsize=0.05, initial_const=1.0, abort_early=False
    )
    oracle = foolbox.PyTorchModel(model._model, bounds=(0, 1))
    theirs = attack(oracle, torch.from_numpy(x), torch.from_numpy(y), epsilons=None)[0].numpy()
    ours = np.sqrt(((found - x) ** 2).sum((1, 2, 3)))
    reference = np.sqrt(((theirs - x) ** 2).sum((1, 2, 3)))
    broken = theirs.any((1, 2, 3))  # foolbox returns black images where it found nothing, and counts them as fooled
    assert np.array_equal(model(found).argmax(1) != y, broken)
    assert broken.mean() > 0.5
    assert ours[broken].mean() == pytest.approx(reference[broken].mean(), rel=0.02)


@pytest.mark.parametrize("name", SWEEP)
def test_the_attackers_surrogate_changes_the_backward_pass_alone(name: str) -> None:
    # in training mode, since an untrained network is silent on its initial running statistics
    model = build_model(small_recipe(neuron={"surrogate": "sigmoid"}), (1, 8, 8), 10)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    attacked = with_surrogate(model, name)
    own, other = input_gradient(model, x, y), input_gradient(attacked, x, y)
    assert torch.equal(own.logits, other.logits)
    assert not torch.allclose(own.gradient, other.gradient)
    assert other.gradient.abs().sum() > 0
    assert model.layers()[0].neuron.surrogate.name == "sigmoid"


def test_the_same_surrogate_gives_the_same_gradient() -> None:
    model = build_model(small_recipe(), (1, 8, 8), 10)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    torch.testing.assert_close(
        input_gradient(model, x, y).gradient, input_gradient(with_surrogate(model, "triangle:1"), x, y).gradient
    )


def test_rate_backward_by_hand() -> None:
    """Two neurons with mean currents 0.5 and 2: the first passes mean(g) / V_th to every step, the second nothing."""
    neuron = RateBackward(LIF(tau=0.5, v_threshold=1.0, surrogate=make_surrogate("triangle")))
    current = torch.tensor([[[0.2, 2.0]], [[0.8, 2.0]]], requires_grad=True)  # [T=2, B=1, 2]
    spikes, _ = neuron(current)
    assert spikes.tolist() == [[[0, 1]], [[0, 1]]]
    spikes.backward(torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]]))
    assert current.grad is not None
    assert current.grad.tolist() == [[[2.0, 0.0]], [[2.0, 0.0]]]


def test_averaged_backward_by_hand() -> None:
    """HART: U = 0.5, then 0.5 * 0.5 + 1 = 1.25; the triangle of width 1 has the slopes 0.5 and 0.75 there."""
    neuron = AveragedBackward(
        LIF(tau=0.5, v_threshold=1.0, surrogate=make_surrogate("sigmoid")), make_surrogate("triangle:1")
    )
    current = torch.tensor([[[0.5]], [[1.0]]], requires_grad=True)  # [T=2, B=1, 1]
    spikes, states = neuron(current)
    assert spikes.flatten().tolist() == [0, 1]
    assert [state.u.item() for state in states] == [0.5, 1.25]
    spikes.backward(torch.tensor([[[1.0]], [[2.0]]]))
    assert current.grad is not None
    assert current.grad.flatten().tolist() == [1.0, 1.0]  # (1 * 0.5 + 2 * 0.75) / 2


def test_surrogates_are_named_with_their_parameter() -> None:
    assert make_surrogate("triangle:0.25").half_width == 0.25
    assert make_surrogate("straight-through").derivative(torch.tensor([-7.0, 0.0])).tolist() == [1, 1]
    for name, expected in (("triangel", "did you mean 'triangle'"), ("triangle:0", "above 0"), ("rate:2", "KIND:NUM")):
        with pytest.raises(InputError, match=expected):
            make_surrogate(name)


def noisy_network(run: Path) -> TorchModel:
    found, model = load_network(run / "best")
    return TorchModel(model, found.shape, found.recipe.validation.seed)


@pytest.fixture(scope="module")
def noisy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("noisy") / "run"
    attack = {"surrogates": ["rate"], "draws": 2, "strong_steps": 2, "l2": 1.0}
    train(small_recipe(encoding={"name": "poisson", "T": 3}, training={"epochs": 4}, attack=attack), out)
    return out


def test_a_stochastic_network_is_repeatable_and_its_attacker_draws_other_noise(noisy_run: Path) -> None:
    model, (x, y) = noisy_network(noisy_run), digits(8)
    assert model.stochastic
    assert np.array_equal(model(x), model(x))
    attacker = model.attacker()
    first, second = attacker(x, y), attacker(x, y)
    assert not np.array_equal(first.gradient, second.gradient)
    assert not np.array_equal(first.logits, model(x))
    again = model.attacker()(x, y)
    assert np.array_equal(again.gradient, first.gradient)


def on_20_images(run: Path) -> Recipe:
    recipe = load_checkpoint(run / "last").recipe
    return recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"limit": 20})})


def test_evaluation_of_a_checkpoint_adds_up(noisy_run: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(attack: Attack) -> list[TierEntry]:
        """The recipe's, with a short search for the nearest image."""
        quick = {"steps": 20, "searches": 2}
        return [replace(e, values=quick) if e.method == "cw-l2" else e for e in recipe_entries(attack)]

    monkeypatch.setattr("mpdsgr_deploy.validation.evaluate.recipe_entries", entries)
    found = evaluate(noisy_run, on_20_images(noisy_run), transfer=run_dir)
    names = [row.name for row in found.rows]
    strong = ["pgd-strong", "strong rate", "cw-l2", "worst"]
    assert names == ["clean", "gaussian", "uniform", "fgsm", "bim", "pgd", "transfer", *strong]
    rows = {row.name: row for row in found.rows}
    assert all(row.n == 20 for row in found.rows)
    assert rows["worst"].artefact.correct <= min(
        row.artefact.correct for row in found.rows if row.name not in ("gaussian", "cw-l2")
    )
    # its images lie at the boundary: under the noise of the answer some are right again, as some clean ones are wrong
    assert rows["cw-l2"].artefact.correct <= rows["clean"].artefact.correct + 2
    assert "largest loss" in rows["pgd-strong"].settings
    assert [check.number for check in found.health] == [1, 2, 3, 6, 7, 14]


def test_a_bundle_evaluates_as_its_checkpoint_and_transfer_is_checked(bundle: Bundle, run_dir: Path) -> None:
    gate = Gate(max_drop=0.5)
    from_torch, from_bundle = (
        {row.name: row for row in validate(Target(bundle), gate=gate, limit=20, transfer=source).rows}
        for source in (run_dir, bundle.path)
    )
    found = evaluate(run_dir, on_20_images(run_dir), transfer=run_dir)
    alone = {row.name: row.artefact for row in found.rows}
    assert from_torch["transfer"].artefact == alone["transfer"]
    assert from_torch["transfer"].reference is None
    assert abs(from_bundle["transfer"].artefact.correct - alone["transfer"].correct) <= 1


def test_strong_pgd_on_a_stochastic_network_is_no_weaker_than_its_last_iterate(noisy_run: Path) -> None:
    """An image that fooled one draw of the noise is not dropped: under other noise the network may be right again."""
    model, (x, y) = noisy_network(noisy_run), digits(120)
    settings = {"eps": 0.1, "step": 0.025, "steps": 8}
    attacked = {keep: pgd(model.attacker(draws=2), x, y, **settings, keep=keep) for keep in ("last", "broken", "worst")}
    right = {keep: (model(images).argmax(1) == y).sum() for keep, images in attacked.items()}
    assert right["worst"] <= right["broken"]
    assert right["worst"] <= right["last"] + 6  # of 120: chance


def test_transfer_from_another_kind_of_network_is_refused(bundle: Bundle, run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir / "best", tmp_path / "other")
    file = tmp_path / "other" / "checkpoint.json"
    file.write_text(file.read_text().replace('"labels": [', '"labels": [\n  "none of these",'))
    done = mpdsgr_here("validate", bundle.path, "--transfer", tmp_path / "other", "--report", tmp_path / "report")
    assert_input_error(done, "takes other images than the network under attack")
