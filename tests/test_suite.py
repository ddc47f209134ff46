"""Conditions carried out: what is drawn depends on the image alone, finished batches are kept, broken images left."""

from pathlib import Path

import numpy as np
import pytest

from mpdsgr_deploy.attacks.run import Journal, gather, run
from mpdsgr_deploy.attacks.suite import Attacked, Batch, Condition, Source, Suite, recipe_plan, required, tier_plan
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork


@pytest.fixture(scope="module")
def network(bundle: Bundle) -> TorchNetwork:
    return TorchNetwork(TorchModel.from_bundle(bundle))


def digits(bundle: Bundle, count: int) -> tuple[np.ndarray, np.ndarray]:
    images = load_test(bundle.manifest.recipe.data)[:count]
    return images.unit(), images.classes


def test_conditions_do_not_depend_on_the_batch_size(bundle: Bundle, network: TorchNetwork) -> None:
    x, y = digits(bundle, 30)
    attack = bundle.manifest.recipe.attack
    plan = tier_plan(TIERS["commit"], attack, "triangle:1")._replace(queries=20, strong_steps=4)
    clean = network(x).argmax(1)
    for condition in Suite(Source(network, "triangle:1"), attack, plan, seed=1).conditions():
        one, other = (gather(list(run(condition, x, y, network, clean, batch_size=size))) for size in (30, 7))
        same = np.abs(one[0].images - other[0].images).max((1, 2, 3)) < 1e-6
        assert same.mean() > 0.9, condition.name  # sign flips of tiny gradients apart
        assert (one[1] == other[1]).mean() > 0.9


def test_seeds_and_conditions_draw_differently(bundle: Bundle, network: TorchNetwork) -> None:
    x, y = digits(bundle, 4)
    attack, batch = bundle.manifest.recipe.attack, Batch(x, y, np.arange(4))

    def noise(seed: int) -> dict[str, np.ndarray]:
        suite = Suite(Source(network, "triangle:1"), attack, recipe_plan(attack), seed=seed)
        found = {}
        for condition in suite.conditions():
            if condition.name in ("gaussian", "uniform"):
                with condition.open() as attacked:
                    found[condition.name] = attacked(batch).images - x
        return found

    first, again, other = noise(0), noise(0), noise(1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["uniform"], other["uniform"])
    assert not np.allclose(np.sign(first["uniform"]), np.sign(first["gaussian"]))


def test_the_recipes_plan_has_the_recipes_surrogates_and_a_tier_those_required(bundle: Bundle) -> None:
    attack = bundle.manifest.recipe.attack
    assert recipe_plan(attack).surrogates == ("triangle:0.5", "rate")
    assert required("triangle:1") == ("triangle:0.25", "triangle:2.5", "rectangular:1")
    assert required("sigmoid:4") == ("sigmoid:16", "sigmoid:1.6", "rectangular:1")  # there a larger one is narrower
    assert required("rectangular:1")[-1] == "rectangular:1"
    plan = tier_plan(TIERS["paper"], attack, "triangle:1")
    assert {*required("triangle:1"), "triangle:0.5", "rate"} == set(plan.surrogates)
    assert plan.adaptive
    assert plan.strong_steps == attack.strong_steps


class Recorder:
    """An attack that darkens images, and remembers which."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, batch: Batch) -> Attacked:
        self.seen += batch.places.tolist()
        return Attacked(batch.x * 0, evaluations=2 * len(batch.x), zero=1)


def darkness(x: np.ndarray) -> np.ndarray:
    """Class 1 for what is not black."""
    light = (x.max((1, 2, 3)) > 0).astype(np.float32)
    return np.stack([1 - light, light], 1)


def test_wrong_images_are_left_alone_and_finished_batches_kept(tmp_path: Path) -> None:
    from contextlib import nullcontext

    x, y = np.ones((7, 1, 2, 2), np.float32), np.ones(7, np.int64)
    clean = np.array([1, 0, 1, 1, 0, 0, 1])
    journal = Journal(tmp_path, "one")
    first = Recorder()
    condition = Condition("dark", "", None, 1, lambda: nullcontext(first))
    parts = run(condition, x, y, darkness, clean, batch_size=3, journal=journal)
    next(parts)
    next(parts)
    del parts  # killed after two of three batches
    second = Recorder()
    condition = condition._replace(open=lambda: nullcontext(second))
    attacked, predicted = gather(list(run(condition, x, y, darkness, clean, batch_size=3, journal=journal)))
    assert (first.seen, second.seen) == ([0, 2, 3], [6])
    assert predicted.tolist() == [0, 0, 0, 0, 0, 0, 0]
    assert [image.max() for image in attacked.images] == [0, 1, 0, 0, 1, 1, 0]
    assert (attacked.evaluations, attacked.zero) == (8, 3)
    third = Recorder()
    condition = condition._replace(open=lambda: nullcontext(third))
    list(run(condition, x, y, darkness, clean, batch_size=3, journal=Journal(tmp_path, "another")))
    assert third.seen == [0, 2, 3, 6]
    for file in tmp_path.rglob("*.npz"):
        file.write_bytes(b"damaged")
    fourth = Recorder()
    condition = condition._replace(open=lambda: nullcontext(fourth))
    list(run(condition, x, y, darkness, clean, batch_size=3, journal=journal))
    assert fourth.seen == [0, 2, 3, 6]
