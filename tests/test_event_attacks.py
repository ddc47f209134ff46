"""Attacks on events: never over budget, always valid frames, and as strong as brute force where greedy is exact."""

from collections.abc import Iterator
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
from attack_networks import frames

from mpdsgr_deploy.attack_graph.attacker import NetworkFile
from mpdsgr_deploy.attacks.condition import Batch
from mpdsgr_deploy.attacks.event_conditions import EventAttack, EventFlips, EventRetiming
from mpdsgr_deploy.attacks.event_search import Edit, EventSearch, applied, counts_of
from mpdsgr_deploy.attacks.resumable_run import gather, run
from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import entry, resolved
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.protocols import Gradient, Predictor
from mpdsgr_deploy.recipe import Attack
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings

SHAPE = (6, 1, 2)  # three frames of two pixels and two polarities


class Plane:
    """Two classes, logits (0, w.x + b): every edit adds its own share to the margin, so that greedy is exact."""

    def __init__(self, seed: int, levels: int, count: int = 40) -> None:
        rng = np.random.default_rng(seed)
        self.w = rng.normal(0, 1, SHAPE).astype(np.float32)
        self.x = (rng.integers(0, levels + 1, (count, *SHAPE)) / levels).astype(np.float32)
        self.b = 1 - (self.x * self.w).sum((1, 2, 3)).min()
        self.y = self(self.x).argmax(1)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        value = ((x * self.w).sum((1, 2, 3)) + self.b).astype(np.float32)
        return np.stack([np.zeros_like(value), value], 1)

    def gradient(self, x: np.ndarray, weights: np.ndarray) -> Gradient:
        logits = self(x)
        return Gradient(logits, (weights * logits).sum(1), weights[:, 1, None, None, None] * self.w)


def attack(condition: EventAttack, network: Predictor, ways: list, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Attacked images, whose validity and budget are checked here by their own arithmetic."""
    batch = Batch(x, y, np.arange(len(y)))
    images = condition.attack((network, ways), batch, condition.generators(batch)).images
    counts, clean = (np.rint(values * condition.levels) for values in (images, x))
    assert images.dtype == np.float32
    assert np.abs(images * condition.levels - counts).max() < 1e-5
    assert counts.min() >= 0
    assert counts.max() <= condition.levels
    changed = np.abs(counts - clean).sum((1, 2, 3))
    if isinstance(condition, EventRetiming):
        frames = [values.reshape(len(y), -1, 2, *x.shape[2:]).sum(1) for values in (counts, clean)]
        assert np.array_equal(*frames)
        changed /= 2
    assert changed.max() <= condition.budget
    assert condition.faults(x, images) == []
    return images


def flips(clean: np.ndarray, levels: int) -> Iterator[Edit]:
    for place, count in enumerate(clean.ravel()):
        if count < levels:
            yield Edit(None, place)
        if count > 0:
            yield Edit(place, None)


def moves(clean: np.ndarray, levels: int, shift: int) -> Iterator[Edit]:
    flat, width = clean.ravel(), clean[0].size * 2
    for out in np.flatnonzero(flat).tolist():
        for into in range(out % width, flat.size, width):
            if flat[into] < levels and 0 < abs(out - into) // width <= shift:
                yield Edit(out, into)


def breakable(network: Predictor, clean: np.ndarray, y: int, edits: list[Edit], budget: int, levels: int) -> bool:
    """Brute force: whether any set of at most `budget` edits fools the network."""
    tried = [
        applied(clean, chosen) for size in range(1, budget + 1) for chosen in combinations_with_replacement(edits, size)
    ]
    valid = [counts for counts in tried if counts.min() >= 0 and counts.max() <= levels]
    return bool((network((np.stack(valid) / levels).astype(np.float32)).argmax(1) != y).any())


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("budget", [1, 2])
@pytest.mark.parametrize("kind", [EventFlips, EventRetiming])
def test_breaks_exactly_what_brute_force_breaks_where_greedy_is_exact(kind: type, budget: int, levels: int) -> None:
    plane = Plane(3, levels)
    options = {"shift": 1} if kind is EventRetiming else {}
    condition = kind(name="events", eps=None, budget=budget, levels=levels, **options)
    images = attack(condition, plane, [plane.gradient], plane.x, plane.y)
    broken = plane(images).argmax(1) != plane.y
    expected = [
        breakable(plane, clean, y, list(moves(clean, levels, 1) if options else flips(clean, levels)), budget, levels)
        for clean, y in zip(counts_of(plane.x, levels), plane.y, strict=True)
    ]
    assert broken.tolist() == expected
    assert 0 < broken.mean() < 1


def test_no_more_events_are_changed_than_are_needed() -> None:
    plane = Plane(1, 1)
    images = attack(EventFlips(name="events", eps=None, budget=9, levels=1), plane, [plane.gradient], plane.x, plane.y)
    broken = np.flatnonzero(plane(images).argmax(1) != plane.y)
    clean = counts_of(plane.x, 1)
    for place in broken[:12].tolist():
        used = int(np.abs(images[place] - plane.x[place]).sum())
        edits = list(flips(clean[place], 1))
        assert used == 1 or not breakable(plane, clean[place], plane.y[place], edits, min(used - 1, 3), 1)


def test_one_event_on_an_exported_spiking_network_is_what_brute_force_finds(tmp_path: Path) -> None:
    _, graph, shape = frames()
    file = tmp_path / "model.onnx"
    save(graph, file)
    predict = OnnxRuntime(file, settings=RuntimeSettings(threads=1))
    x = np.random.default_rng(0).integers(0, 2, (40, *shape)).astype(np.float32)
    first, second = np.sort(predict(x), axis=1)[:, :-3:-1].T
    x = x[np.argsort(first - second)[[0, 1, -2, -1]]]  # near the boundary and far from it
    y = predict(x).argmax(1)
    network = NetworkFile(file, predict)
    asking = (EventSearch(rounds=1, share=1.0, candidates=6 * x[0].size),)  # about every edit that there is
    options = {"eps": None, "surrogate": "pdsg", "others": (), "budget": 1, "levels": 1, "steps": 1, "asking": asking}
    made = [EventFlips(name="flips", **options), EventRetiming(name="moves", **options)]
    for condition in made:
        with condition.target(network) as target:
            images = attack(condition, *target, x, y)
        broken = predict(images).argmax(1) != y
        assert 0 < broken.sum() < len(y)
        for clean, label, is_broken in zip(counts_of(x, 1), y, broken, strict=True):
            edits = list(flips(clean, 1) if condition.method == "event-flips" else moves(clean, 1, 3))
            assert breakable(predict, clean, label, edits, 1, 1) == is_broken


def test_a_suite_carries_them_out_and_their_budget_is_the_recipes() -> None:
    attacks = [entry("event-flips", "event-flips"), entry("event-retiming", "event-retiming", shift=2)]
    conditions = list(resolved(attacks, Attack(events=3, also=("event-flips",)), "triangle:1"))
    assert [(c.budget, c.eps, c.surrogate) for c in conditions] == [(3, None, "pdsg")] * 3
    assert len({c.settings for c in conditions}) == 2
    plane = Plane(3, 5)
    suite = Suite(Source(_Whole(plane), "triangle:1"), tuple(conditions))
    images, predicted = gather(list(run(suite, conditions[0], plane.x, plane.y, plane.y, batch_size=7)))
    whole, _ = gather(list(run(suite, conditions[0], plane.x, plane.y, plane.y, batch_size=40)))
    assert np.array_equal(images.images, whole.images)  # no recording depends on another
    assert images.evaluations > 0
    assert (predicted != plane.y).any()


class _Whole(Plane):
    stochastic = False

    def __init__(self, plane: Plane) -> None:
        self.__dict__ |= plane.__dict__

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> "_Opened":
        return _Opened(self)


class _Opened:
    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def __enter__(self) -> object:
        return self._plane.gradient

    def __exit__(self, *exception: object) -> None:
        pass


def test_what_breaks_the_rules_is_told() -> None:
    clean = np.zeros((1, *SHAPE), np.float32)
    clean[0, 0, 0, 0] = 1
    rules = {"eps": None, "budget": 1, "levels": 1}
    flip, move = EventFlips(name="flips", **rules), EventRetiming(name="moves", **rules)
    added, moved, half = clean.copy(), clean.copy(), clean.copy()
    added[0, 1, 0, :] = 1
    moved[0, 0, 0, 0], moved[0, 2, 0, 0] = 0, 1
    half[0, 0, 0, 0] = 0.5
    assert flip.faults(clean, added) == ["flips has an image with more than 1 events added or removed"]
    assert move.faults(clean, moved) == []
    assert move.faults(clean, added) == ["moves has an image with more than 1 events moved to another frame"]
    assert "no counts" in flip.faults(clean, half)[0]
    with pytest.raises(InputError, match="frames of 0 to 1 events per pixel"):
        attack(flip, Plane(0, 1), [Plane(0, 1).gradient], half, np.zeros(1, np.int64))
    with pytest.raises(InputError, match="this network has 3 channels"):
        move.propose(*np.zeros((2, 3, 1, 1), np.int64), np.zeros((3, 1, 1), np.float32), 4)
