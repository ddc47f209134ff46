"""MPD-APGD against a linear model's closed form, against APGD, and on what it does with images that broke."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch
from linear_model import EPS, Linear, draw, linear

from mpdsgr_deploy.attacks import apgd, mpd_apgd, sa_pgd
from mpdsgr_deploy.attacks.condition import Condition
from mpdsgr_deploy.attacks.mpd_apgd import QUICK, SCHEDULE, Round, Through, gradients
from mpdsgr_deploy.attacks.resumable_run import gather, run
from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import entry, resolved
from mpdsgr_deploy.protocols import Array, Gradient
from mpdsgr_deploy.recipe import Attack

WAYS = list(dict.fromkeys(turn.through for turn in SCHEDULE))


class Counted:
    """A Differentiable that counts the images it is asked about."""

    def __init__(self, target: Linear) -> None:
        self.target, self.images = target, 0

    def __call__(self, x: Array, y: Array) -> Gradient:
        self.images += len(x)
        return self.target(x, y)


class Blind:
    """Answers as a linear model does, with the gradient of another: no attack gets anywhere through it."""

    def __init__(self, target: Linear) -> None:
        self.target = target

    def __call__(self, x: Array, y: Array) -> Gradient:
        answer = self.target(x, y)
        return Gradient(answer.logits, answer.loss, -answer.gradient)


ONE, OTHER = Through(20), Through(10)


def turn(climb: str, through: Through = ONE, length: int = 1, near: float = 1e9, aim: int | None = None) -> Round:
    return Round(climb, through, length, near, aim)


@pytest.mark.parametrize("keep", ["broken", "worst"])
def test_breaks_exactly_the_images_of_a_linear_model_whose_margin_is_too_small(keep: str) -> None:
    target, x, y = linear()
    adversarial = mpd_apgd(dict.fromkeys(WAYS, target), x, y, eps=EPS, steps=20, draw=draw, keep=keep)
    broken = target(adversarial).argmax(1) != y
    assert np.array_equal(broken, target.gap(x) < 0)
    assert 0.2 < broken.mean() < 0.95
    assert np.abs(adversarial - x).max() <= EPS + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert adversarial.dtype == np.float32


@pytest.mark.parametrize("keep", ["broken", "worst"])
@pytest.mark.parametrize("start", [None, draw])
def test_a_round_is_apgd_or_sa_pgd(keep: str, start: object) -> None:
    target, x, y = linear()
    options = {"eps": EPS, "steps": 9, "draw": start, "keep": keep}
    by_image = mpd_apgd({ONE: target}, x, y, schedule=[turn("apgd")], **options)
    assert np.array_equal(by_image, apgd(target, x, y, step=EPS / 2, **options))
    by_pixel = mpd_apgd({ONE: target}, x, y, schedule=[turn("sa-pgd")], **options)
    assert np.array_equal(by_pixel, sa_pgd(target, x, y, **options))


def test_takes_tensors() -> None:
    target, x, y = linear()
    targets, options = dict.fromkeys(WAYS, target), {"eps": EPS, "steps": 3}
    adversarial = mpd_apgd(targets, torch.from_numpy(x), torch.from_numpy(y), **options)
    assert isinstance(adversarial, torch.Tensor)
    np.testing.assert_allclose(adversarial.numpy(), mpd_apgd(targets, x, y, **options), atol=1e-5)


def test_a_later_target_breaks_what_the_first_cannot() -> None:
    target, x, y = linear()
    both, schedule = {ONE: Blind(target), OTHER: target}, [turn("sa-pgd"), turn("apgd", OTHER)]
    adversarial = mpd_apgd(both, x, y, eps=EPS, steps=20, schedule=schedule, draw=draw)
    assert np.array_equal(target(adversarial).argmax(1) != y, target.gap(x) < 0)


@pytest.mark.parametrize("climb", ["sa-pgd", "apgd"])
def test_aimed_at_the_only_wrong_class_is_untargeted(climb: str) -> None:
    target, x, y = linear()
    for aim in (0, 1):
        adversarial = mpd_apgd({ONE: target}, x, y, eps=EPS, steps=20, schedule=[turn(climb, aim=aim)])
        assert np.array_equal(target(adversarial).argmax(1) != y, target.gap(x) < 0)


def test_broken_images_cost_nothing_more() -> None:
    target, x, y = linear()
    first, second = Counted(target), Counted(target)
    schedule = [turn("sa-pgd"), turn("apgd", OTHER)]
    mpd_apgd({ONE: first, OTHER: second}, x, y, eps=EPS, steps=20, schedule=schedule, draw=draw)
    standing = int((target.gap(x) > 0).sum())
    assert second.images == standing * 22  # 21 gradients and a last look
    assert first.images < len(x) * 23
    assert gradients(20, schedule) == 1 + 2 * 22


def test_images_that_come_no_nearer_cost_nothing_more() -> None:
    """What is left of a linear margin is known: 1 - eps |w|_1 / margin of it."""
    target, x, y = linear()
    distance = target.gap(x) + EPS
    share = 1 - EPS / distance
    second = Counted(target)
    schedule = [turn("sa-pgd", near=0.3), turn("apgd", OTHER)]
    mpd_apgd({ONE: target, OTHER: second}, x, y, eps=EPS, steps=20, schedule=schedule, draw=draw)
    near = int(((share > 0) & (share <= 0.3)).sum())
    assert 0 < near < (share > 0).sum()
    assert second.images == near * 22


def test_one_class_cannot_be_fooled() -> None:
    x = np.random.default_rng(0).random((3, 1, 2, 2), np.float32)
    single = lambda x, y: Gradient(np.ones((len(x), 1), np.float32), np.zeros(len(x)), x)  # noqa: E731
    assert np.array_equal(mpd_apgd(dict.fromkeys(WAYS, single), x, np.zeros(3, np.int64), eps=EPS), x)


def test_starts_do_not_depend_on_other_images() -> None:
    target, x, y = linear()

    def each(rows: slice) -> np.ndarray:
        rngs = [np.random.default_rng(place) for place in range(len(x))[rows]]
        own = lambda shape: np.stack([rng.uniform(-1, 1, shape[1:]) for rng in rngs]).astype(np.float32)  # noqa: E731
        return mpd_apgd(dict.fromkeys(WAYS, target), x[rows], y[rows], eps=EPS, steps=2, draw=own)

    together = each(slice(0, 40))
    np.testing.assert_allclose(np.concatenate([each(slice(0, 13)), each(slice(13, 40))]), together, atol=1e-6)


class Linears:
    """A `Network` whose gradients are a linear model's through the sharpness 20, and point the wrong way otherwise."""

    stochastic = False

    def __init__(self, target: Linear) -> None:
        self.linear, self.opened = target, list[str]()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.linear(x)

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager:
        self.opened.append(f"{surrogate} {loss}")
        return nullcontext(self.linear if ":20" in surrogate else Blind(self.linear))

    def adaptive(self, *, draws: int) -> AbstractContextManager:
        raise NotImplementedError


def condition(method: str = "mpd-apgd", **values: object) -> Condition:
    attack = Attack(eps=EPS, step=EPS / 4)
    (made,) = resolved([entry(method, method, **{"steps": 20, **values})], attack, "triangle:1")
    return made


def test_the_condition_goes_through_every_surrogate_and_loss_of_its_rounds() -> None:
    target, x, y = linear()
    network, made = Linears(target), condition()
    suite = Suite(Source(network, "triangle:1"), (made,))
    attacked, predicted = gather(list(run(suite, made, x, y, y, batch_size=50)))
    assert network.opened == [f"superspike:{way.sharpness:g} {way.loss}" for way in WAYS]
    assert np.array_equal(predicted != y, target.gap(x) < 0)
    assert len(x) < attacked.evaluations <= made.cost * len(x)


def test_hart_goes_through_every_width_and_leaves_broken_images_alone() -> None:
    target, x, y = linear()
    network, made = Linears(target), condition("hart", widths=(20, 7), steps=4)
    suite = Suite(Source(network, "triangle:1"), (made,))
    attacked, _ = gather(list(run(suite, made, x, y, y, batch_size=50)))
    assert network.opened == ["triangle:20+averaged ce", "triangle:7+averaged ce"]
    assert len(x) < attacked.evaluations < made.cost * len(x)


def test_the_settings_tell_all_that_makes_it_stronger() -> None:
    variants = [
        condition(),
        condition(steps=30),
        condition(schedule=QUICK),
        condition("hart"),
        condition("hart", steps=30),
    ]
    variants.append(condition("hart", widths=(0.5, 1.0)))
    assert len({made.settings for made in variants}) == len(variants)
