"""MPD-APGD against a linear model's closed form, against APGD, and on what it does with images that broke."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch
from test_attacks_strong import EPS, Linear, draw, linear

from mpdsgr_deploy.attacks import apgd, mpd_apgd, sa_pgd
from mpdsgr_deploy.attacks.condition import Condition
from mpdsgr_deploy.attacks.run import gather, run
from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import entry, resolved
from mpdsgr_deploy.protocols import Array, Gradient
from mpdsgr_deploy.recipe import Attack


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


@pytest.mark.parametrize("keep", ["broken", "worst"])
def test_breaks_exactly_the_images_of_a_linear_model_whose_margin_is_too_small(keep: str) -> None:
    target, x, y = linear()
    adversarial = mpd_apgd([target, target], x, y, eps=EPS, steps=20, draw=draw, keep=keep, rounds=3)
    broken = target(adversarial).argmax(1) != y
    assert np.array_equal(broken, target.gap(x) < 0)
    assert 0.2 < broken.mean() < 0.95
    assert np.abs(adversarial - x).max() <= EPS + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert adversarial.dtype == np.float32


@pytest.mark.parametrize("keep", ["broken", "worst"])
@pytest.mark.parametrize("start", [None, draw])
def test_is_apgd_or_sa_pgd_with_one_target_and_one_round(keep: str, start: object) -> None:
    target, x, y = linear()
    options = {"eps": EPS, "steps": 9, "draw": start, "keep": keep}
    by_image = mpd_apgd([target], x, y, rounds=1, climbs=["apgd"], **options)
    assert np.array_equal(by_image, apgd(target, x, y, step=EPS / 2, **options))
    by_pixel = mpd_apgd([target], x, y, rounds=1, climbs=["sa-pgd"], **options)
    assert np.array_equal(by_pixel, sa_pgd(target, x, y, **options))


def test_takes_tensors() -> None:
    target, x, y = linear()
    targets, options = [target, target], {"eps": EPS, "steps": 9, "rounds": 2}
    adversarial = mpd_apgd(targets, torch.from_numpy(x), torch.from_numpy(y), **options)
    assert isinstance(adversarial, torch.Tensor)
    np.testing.assert_allclose(adversarial.numpy(), mpd_apgd(targets, x, y, **options), atol=1e-5)


def test_a_later_target_breaks_what_the_first_cannot() -> None:
    target, x, y = linear()
    adversarial = mpd_apgd([Blind(target), target], x, y, eps=EPS, steps=20, rounds=2, draw=draw)
    assert np.array_equal(target(adversarial).argmax(1) != y, target.gap(x) < 0)


def test_broken_images_cost_nothing_more() -> None:
    target, x, y = linear()
    first, second = Counted(target), Counted(target)
    mpd_apgd([first, second], x, y, eps=EPS, steps=20, rounds=2, draw=draw)
    standing = int((target.gap(x) > 0).sum())
    assert second.images == standing * 22  # 21 gradients and a last look
    assert first.images < len(x) * 22


def test_starts_do_not_depend_on_other_images() -> None:
    target, x, y = linear()

    def each(rows: slice) -> np.ndarray:
        rngs = [np.random.default_rng(place) for place in range(len(x))[rows]]
        own = lambda shape: np.stack([rng.uniform(-1, 1, shape[1:]) for rng in rngs]).astype(np.float32)  # noqa: E731
        return mpd_apgd([target, target], x[rows], y[rows], eps=EPS, steps=5, draw=own, rounds=4)

    together = each(slice(0, 40))
    np.testing.assert_allclose(np.concatenate([each(slice(0, 13)), each(slice(13, 40))]), together, atol=1e-6)


def test_rounds_need_a_draw() -> None:
    target, x, y = linear()
    with pytest.raises(ValueError, match="draw"):
        mpd_apgd([target], x, y, eps=EPS, rounds=2)


class Linears:
    """A `Network` whose gradients are a linear model's through the sharpness 20, and point the wrong way otherwise."""

    stochastic = False

    def __init__(self, target: Linear) -> None:
        self.linear, self.opened = target, list[str]()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.linear(x)

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager:
        self.opened.append(surrogate)
        return nullcontext(self.linear if surrogate.endswith(":20") else Blind(self.linear))

    def adaptive(self, *, draws: int) -> AbstractContextManager:
        raise NotImplementedError


def condition(**values: object) -> Condition:
    attack = Attack(eps=EPS, step=EPS / 4)
    (made,) = resolved([entry("mpd-apgd", "mpd-apgd", steps=20, **values)], attack, "triangle:1")
    return made


def test_the_condition_goes_through_every_sharpness() -> None:
    target, x, y = linear()
    network, made = Linears(target), condition()
    suite = Suite(Source(network, "triangle:1"), (made,))
    attacked, predicted = gather(list(run(suite, made, x, y, y, batch_size=50)))
    assert network.opened == ["superspike:20", "superspike:10", "superspike:30"]
    assert np.array_equal(predicted != y, target.gap(x) < 0)
    assert attacked.evaluations <= made.cost * len(x)
    assert attacked.evaluations > len(x)


def test_the_settings_tell_all_that_makes_it_stronger() -> None:
    variants = [condition(), condition(sharpnesses=(10.0,)), condition(rounds=2), condition(loss="dlr")]
    assert len({made.settings for made in variants}) == len(variants)
