"""Strong attacks on models whose answer a hand can work out: linear ones, peaks and hills."""

import numpy as np
import pytest
import torch
from linear_model import EPS, Linear, linear

from mpdsgr_deploy.attacks import apgd, hart, pgd, sa_pgd, square
from mpdsgr_deploy.attacks.apgd import checkpoints
from mpdsgr_deploy.attacks.counting import CountedGradients, GradientCounts
from mpdsgr_deploy.protocols import Array, Gradient

ATTACKS = {
    "pgd": lambda target, x, y: pgd(target, x, y, eps=EPS, step=EPS / 4, steps=12, keep="broken", restarts=1),
    "apgd": lambda target, x, y: apgd(target, x, y, eps=EPS, steps=20),
    "apgd-worst": lambda target, x, y: apgd(target, x, y, eps=EPS, steps=20, keep="worst"),
    "sa-pgd": lambda target, x, y: sa_pgd(target, x, y, eps=EPS, steps=20),
    "sa-pgd-worst": lambda target, x, y: sa_pgd(target, x, y, eps=EPS, steps=20, keep="worst"),
    "hart": lambda target, x, y: hart([target, target], x, y, eps=EPS, steps=20),
    "hart-worst": lambda target, x, y: hart([target, target], x, y, eps=EPS, steps=20, keep="worst"),
    "square": lambda target, x, y: square(target, x, y, eps=EPS, queries=1500).images,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_breaks_exactly_the_images_of_a_linear_model_whose_margin_is_too_small(name: str) -> None:
    target, x, y = linear()
    found = ATTACKS[name](target, x, y)
    broken = target(found).argmax(1) != y
    assert np.array_equal(broken, target.gap(x) < 0)
    assert 0.2 < broken.mean() < 0.95
    assert np.abs(found - x).max() <= EPS + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.dtype == np.float32


@pytest.mark.parametrize("name", ["pgd", "apgd", "apgd-worst", "sa-pgd", "sa-pgd-worst", "hart"])
def test_tensors_and_arrays_break_the_same_images(name: str) -> None:
    target, x, y = linear()
    found = ATTACKS[name](target, torch.from_numpy(x), torch.from_numpy(y))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), ATTACKS[name](target, x, y), atol=1e-5)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_planted_weakness_is_found(name: str) -> None:
    """One pixel decides, and nothing else; every image can be broken by moving that pixel."""
    w = np.full((1, 5, 5), 1e-4)
    w[0, 3, 1] = 10
    target = Linear(w, 0)
    x = np.random.default_rng(0).uniform(0, 1, (40, 1, 5, 5)).astype(np.float32)
    x[:, 0, 3, 1] = np.random.default_rng(1).uniform(0.42, 0.58, 40)
    target.b = np.float32(-5)
    y = target(x).argmax(1)
    assert (target(ATTACKS[name](target, x, y)).argmax(1) != y).all()


def test_checkpoints_of_apgd_by_hand() -> None:
    """p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 as the paper's rule gives them."""
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(10)) == [3, 5, 6, 7, 8, 9, 10]


def test_apgd_halves_the_step_size_until_it_meets_a_narrow_peak() -> None:
    """The loss peaks at 0.5321: steps of a fixed size jump over it, halved ones come close."""

    def peak(x: Array, y: Array) -> Gradient:
        value = x[:, 0, 0, 0]
        slope = np.sign(np.float32(0.5321) - value)[:, None, None, None]
        return Gradient(np.ones((len(x), 2)) * [1, 0], -np.abs(value - 0.5321), slope)

    x, y = np.full((3, 1, 1, 1), 0.45, np.float32), np.zeros(3, np.int64)
    found = apgd(peak, x, y, eps=EPS, steps=100)
    assert found.ravel() == pytest.approx([0.5321] * 3, abs=0.002)


def test_an_image_costs_gradients_only_until_it_is_broken() -> None:
    target, x, y = linear()
    counted = {name: CountedGradients(target, GradientCounts()) for name in ("apgd", "sa-pgd")}
    right = (y + 1) % 2  # every image is "broken" before the first step
    for name, target in counted.items():
        ATTACKS[name](target, x, right)
        assert target.counts.samples == len(x)
        ATTACKS[name](target, x, y)
        assert 2 * len(x) < target.counts.samples < 22 * len(x)


def test_restarts_reach_what_one_start_misses_and_leave_the_broken_alone() -> None:
    """Half of the ball leads to a harmless maximum: every restart saves half of the images that are left."""

    def hills(x: Array, y: Array) -> Gradient:
        value = x[:, 0, 0, 0] - 0.5
        logits = np.stack([np.where(value > 0.09, -1.0, 1.0), np.zeros_like(value)], 1)
        return Gradient(logits, np.abs(value), np.sign(value)[:, None, None, None])

    x, y = np.full((64, 1, 1, 1), 0.5, np.float32), np.zeros(64, np.int64)
    for keep in ("last", "broken"):
        left, cost = [], []
        for restarts in (1, 2, 4):
            target, rng = CountedGradients(hills, GradientCounts()), np.random.default_rng(0)
            found = pgd(
                target, x, y, eps=EPS, step=EPS / 4, steps=8, keep=keep, restarts=restarts,
                draw=lambda shape, rng=rng: rng.uniform(-1, 1, shape).astype(np.float32),
            )  # fmt: skip
            left.append((hills(found, y).logits.argmax(1) == y).sum())
            cost.append(target.counts.samples)
        assert left[0] > left[1] > left[2]
        assert cost[2] < 3 * cost[0]
    with pytest.raises(ValueError, match="restarts"):
        pgd(hills, x, y, eps=EPS, step=EPS, steps=1, restarts=2)


def test_starts_do_not_depend_on_whether_other_images_are_broken() -> None:
    target, x, y = linear()
    settings = {"eps": EPS, "step": EPS / 8, "steps": 3, "keep": "broken", "restarts": 3}

    def run(y: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(0)
        return pgd(target, x, y, **settings, draw=lambda shape: rng.uniform(-1, 1, shape).astype(np.float32))

    others = y.copy()
    others[::2] = 1 - others[::2]  # those leave at once
    assert np.array_equal(run(y)[1::2], run(others)[1::2])
