"""Attacks against closed forms and against foolbox."""

import foolbox
import numpy as np
import pytest
import torch
from torch import nn

from mpdsgr_deploy.attacks import bim, fgsm, gaussian, pgd, uniform
from mpdsgr_deploy.attacks.torch_target import input_gradient
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.protocols import Array, Gradient
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.runtime.torch_model import TorchModel

EPS, STEP, STEPS = 0.1, 0.03, 7


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


class Linear:
    """Two classes, logits (0, w.x + b): the loss rises fastest along sign(w), whatever x is."""

    def __init__(self, w: np.ndarray, b: float) -> None:
        self.w, self.b = w.astype(np.float32), b

    def margin(self, x: np.ndarray) -> np.ndarray:
        return (x * self.w).sum((1, 2, 3)) + self.b

    def __call__(self, x: Array, y: Array) -> Gradient:
        margin = self.margin(x)
        logits = np.stack([np.zeros_like(margin), margin], 1)
        sign = np.where(y == 1, -1.0, 1.0)
        loss = np.logaddexp(0, sign * margin)
        slope = sign / (1 + np.exp(-sign * margin))
        return Gradient(logits, loss, (slope[:, None, None, None] * self.w).astype(np.float32))


@pytest.fixture
def linear() -> tuple[Linear, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, (2, 3, 3))
    target = Linear(w, -0.5 * w.sum())  # the boundary passes through the middle of [0, 1]
    x = rng.uniform(0, 1, (200, 2, 3, 3)).astype(np.float32)
    return target, x, (target.margin(x) > 0).astype(np.int64)


def worst_linear_point(target: Linear, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The exact maximiser of the loss in the ball intersected with [0, 1]."""
    sign = np.where(y == 1, -1, 1)[:, None, None, None]
    return np.clip(x + EPS * sign * np.sign(target.w), 0, 1).astype(np.float32)


@pytest.mark.parametrize("keep", ["last", "broken", "worst"])
def test_pgd_finds_the_closed_form_optimum_of_a_linear_model(linear, keep: str) -> None:
    target, x, y = linear
    found = pgd(target, x, y, eps=EPS, step=EPS / 4, steps=20, draw=draw, keep=keep)
    best = worst_linear_point(target, x, y)
    breakable = (target.margin(best) > 0) != y
    assert np.array_equal((target.margin(found) > 0) != y, breakable)
    assert 0.2 < breakable.mean() < 0.95
    if keep == "last":
        np.testing.assert_allclose(found, best, atol=1e-6)


def test_fgsm_and_bim_reach_it_too(linear) -> None:
    target, x, y = linear
    best = worst_linear_point(target, x, y)
    np.testing.assert_allclose(fgsm(target, x, y, eps=EPS), best, atol=1e-6)
    np.testing.assert_allclose(bim(target, x, y, eps=EPS, step=STEP, steps=STEPS), best, atol=1e-6)


def test_keeping_the_broken_returns_an_iterate_that_a_later_step_would_undo() -> None:
    """The loss climbs past a narrow gap where the label flips: the last iterate is harmless, one before it is not."""

    class Gap:
        def __call__(self, x: Array, y: Array) -> Gradient:
            value = x[:, 0, 0, 0]
            fooled = (value > 0.54) & (value < 0.56)
            logits = np.stack([np.where(fooled, -1.0, 1.0), np.zeros_like(value)], 1)
            return Gradient(logits, value, np.ones_like(x))

    x, y = np.full((3, 1, 1, 1), 0.5, np.float32), np.zeros(3, np.int64)
    settings = {"eps": 0.1, "step": 0.05, "steps": 2}
    assert Gap()(pgd(Gap(), x, y, **settings), y).logits.argmax(1).tolist() == [0, 0, 0]
    assert Gap()(pgd(Gap(), x, y, **settings, keep="broken"), y).logits.argmax(1).tolist() == [1, 1, 1]


def test_keeping_the_worst_returns_the_iterate_of_the_largest_loss() -> None:
    """The loss peaks at 0.55, which the third of four steps leaves behind."""

    def peak(x: Array, y: Array) -> Gradient:
        value = x[:, 0, 0, 0]
        return Gradient(np.zeros((len(x), 2)), -np.abs(value - 0.55), np.ones_like(x))

    x, y = np.array([0.5, 0.53], np.float32).reshape(2, 1, 1, 1), np.zeros(2, np.int64)
    settings = {"eps": 0.2, "step": 0.025, "steps": 4}
    assert pgd(peak, x, y, **settings).ravel() == pytest.approx([0.6, 0.63])
    assert pgd(peak, x, y, **settings, keep="worst").ravel() == pytest.approx([0.55, 0.555])


@pytest.fixture(scope="module")
def spiking(bundle: Bundle) -> tuple[TorchModel, np.ndarray, np.ndarray]:
    images = load_test(Data(name="digits"))[:96]
    return TorchModel.from_bundle(bundle), images.unit(), images.classes


@pytest.mark.parametrize("name", ["fgsm", "bim"])
def test_equal_to_foolbox_sample_by_sample(spiking, name: str) -> None:
    model, x, y = spiking
    oracle = foolbox.PyTorchModel(model._model, bounds=(0, 1))
    if name == "fgsm":
        attack = foolbox.attacks.LinfFastGradientAttack()
        ours = fgsm(model.attacker(), x, y, eps=EPS)
    else:
        attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=STEP, steps=STEPS, random_start=False)
        ours = bim(model.attacker(), x, y, eps=EPS, step=STEP, steps=STEPS)
    _, theirs, success = attack(oracle, torch.from_numpy(x), torch.from_numpy(y), epsilons=EPS)
    assert np.array_equal(ours, theirs.numpy())
    assert np.array_equal(model(ours).argmax(1) != y, success.numpy())
    assert success.float().mean() > 0.05


def test_pgd_within_a_few_points_of_foolbox(spiking) -> None:
    """On all 497 test images: their random starts are others than ours, so the two agree up to chance only."""
    model, images = spiking[0], load_test(Data(name="digits"))
    x, y = images.unit(), images.classes
    torch.manual_seed(0)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=True)
    oracle = foolbox.PyTorchModel(model._model, bounds=(0, 1))
    _, _, success = attack(oracle, torch.from_numpy(x), torch.from_numpy(y), epsilons=EPS)
    ours = pgd(model.attacker(), x, y, eps=EPS, step=STEP, steps=STEPS, draw=draw)
    assert (model(ours).argmax(1) != y).mean() == pytest.approx(success.float().mean().item(), abs=0.05)


def test_strong_pgd_breaks_at_least_what_its_last_iterate_breaks(spiking) -> None:
    model, x, y = spiking
    settings = {"eps": EPS, "step": EPS / 4, "steps": 10, "draw": draw}
    last = model(pgd(model.attacker(), x, y, **settings)).argmax(1) != y
    ever = model(pgd(model.attacker(), x, y, **settings, keep="broken")).argmax(1) != y
    assert (ever >= last).all()


@pytest.mark.parametrize("keep", ["last", "broken", "worst"])
def test_images_stay_in_the_ball_and_in_range(spiking, keep: str) -> None:
    model, x, y = spiking
    found = pgd(model.attacker(), x, y, eps=EPS, step=0.07, steps=3, draw=draw, keep=keep)
    assert np.abs(found - x).max() <= EPS + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.dtype == np.float32


def test_noise_has_the_stated_spread() -> None:
    x = np.full((4, 1, 100, 100), 0.5, np.float32)
    shift = uniform(x, eps=0.1, rng=np.random.default_rng(0)) - x
    assert np.abs(shift).max() <= 0.1 + 1e-6
    assert shift.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
    shift = gaussian(x, std=0.05, rng=np.random.default_rng(0)) - x
    assert shift.std() == pytest.approx(0.05, rel=0.02)
    assert np.array_equal(
        gaussian(x, std=0.1, rng=np.random.default_rng(3)), gaussian(x, std=0.1, rng=np.random.default_rng(3))
    )


def test_input_gradient_is_of_each_samples_own_loss_and_leaves_weights_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.rand(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    found = input_gradient(lambda x: model(x), x, y)
    assert all(p.grad is None for p in model.parameters())
    step = 1e-3
    for i in range(4):
        bumped = x.clone()
        bumped[i, 0, 1, 1] += step
        numeric = (input_gradient(model, bumped, y).loss - found.loss) / step
        assert numeric[i].item() == pytest.approx(found.gradient[i, 0, 1, 1].item(), abs=1e-3)
        assert all(numeric[j].item() == 0 for j in range(4) if j != i)


@pytest.mark.parametrize("keep", ["last", "broken", "worst"])
def test_tensors_and_arrays_take_the_same_path(linear, keep: str) -> None:
    target, x, y = linear

    def on_tensors(x: torch.Tensor, y: torch.Tensor) -> Gradient:
        return Gradient(*(torch.as_tensor(part) for part in target(x.numpy(), y.numpy())))

    settings = {"eps": EPS, "step": EPS / 4, "steps": 5, "keep": keep}
    found = pgd(on_tensors, torch.from_numpy(x), torch.from_numpy(y), **settings)
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), pgd(target, x, y, **settings), atol=1e-6)
