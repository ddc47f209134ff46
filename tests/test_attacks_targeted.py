"""APGD-T and FAB-T against closed forms, AutoAttack's own code, and networks of few classes."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.attacks.apgd import apgd_t
from mpdsgr_deploy.attacks.condition import Network
from mpdsgr_deploy.attacks.fab import fab_t, onto_plane
from mpdsgr_deploy.attacks.resumable_run import gather, run
from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.targets import likeliest_wrong, targeted_dlr, try_each_class
from mpdsgr_deploy.attacks.tiers import TIERS, entry, resolved
from mpdsgr_deploy.attacks.torch_target import input_gradient, weighted
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.recipe import Attack
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork

EPS, SHAPE = 0.08, (2, 4, 4)


class Small(Network):
    """A smooth torch network with K classes as a `Network`."""

    stochastic = False

    def __init__(self, count: int) -> None:
        torch.manual_seed(0)
        size = int(np.prod(SHAPE))
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(size, 24), nn.Tanh(), nn.Linear(24, count)).eval()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.from_numpy(x)).numpy().copy()

    def gradients(self, x: np.ndarray, weights: np.ndarray) -> Gradient:
        answer = input_gradient(self.model, torch.from_numpy(x), torch.from_numpy(weights), weighted)
        return Gradient(*(part.numpy() for part in answer))

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager:
        assert loss == "weighted"
        return nullcontext(self.gradients)

    def adaptive(self, *, draws: int) -> AbstractContextManager:
        raise NotImplementedError


def images(network: Small, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Images and the network's own classes for them."""
    x = np.random.default_rng(0).uniform(0, 1, (count, *SHAPE)).astype(np.float32)
    return x, network(x).argmax(1)


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def attacks(network: Small, x: np.ndarray, y: np.ndarray, **options: int) -> dict[str, np.ndarray]:
    return {
        "apgd-t": apgd_t(network, network.gradients, x, y, eps=EPS, draw=draw, **options),
        "fab-t": fab_t(network, network.gradients, x, y, eps=EPS, **options),
    }


@pytest.mark.parametrize("count", [4, 10])
def test_both_break_what_their_authors_break(count: int) -> None:
    pyautoattack = pytest.importorskip("pyautoattack")
    network = Small(count)
    x, y = images(network)
    ours = attacks(network, x, y, steps=50, classes=count - 1)
    oracle = pyautoattack.AutoAttack(network.model, eps=EPS, seed=0, device="cpu")
    oracle.apgd_targeted.n_iter = oracle.fab.n_iter = 50
    oracle.apgd_targeted.n_target_classes = oracle.fab.n_target_classes = count - 1
    oracle.fab.targeted, oracle.fab.seed = True, 0
    for name, attack in (("apgd-t", oracle.apgd_targeted), ("fab-t", oracle.fab)):
        theirs = attack.perturb(torch.from_numpy(x), torch.from_numpy(y)).detach().numpy()
        mine, other = (network(made).argmax(1) != y for made in (ours[name], theirs))
        assert 0.2 < other.mean() < 0.95
        assert (mine != other).sum() <= 1, name
        assert np.abs(ours[name] - x).max() <= EPS + 1e-6
        assert 0 <= ours[name].min() <= ours[name].max() <= 1


def test_a_projection_is_that_of_autoattack() -> None:
    oracle = pytest.importorskip("pyautoattack.fab_projections")
    rng = np.random.default_rng(0)
    points, normals = rng.uniform(0, 1, (200, 12)).astype(np.float32), rng.normal(0, 1, (200, 12)).astype(np.float32)
    normals[rng.random(normals.shape) < 0.1] = 0
    offsets = ((normals * points).sum(1) + rng.normal(0, 3, 200)).astype(np.float32)
    theirs = oracle.projection_linf(*(torch.from_numpy(array) for array in (points, normals, offsets))).numpy()
    np.testing.assert_allclose(onto_plane(points, normals, offsets), theirs, atol=2e-5)


def test_a_projection_by_hand() -> None:
    """x0 can fall by 0.1 alone, so x1 falls by 0.3: 1 * 0.1 + 1 * 0.3 = 0.4."""
    points, normals = np.array([[0.1, 0.9, 0.5]], np.float32), np.array([[1, 1, 0]], np.float32)
    np.testing.assert_allclose(onto_plane(points, normals, np.array([0.6])), [[-0.1, -0.3, 0]], atol=1e-6)
    assert not onto_plane(points, normals, np.array([1.0])).any()  # it lies on the plane
    assert not onto_plane(points, 0 * normals, np.array([1.0])).any()  # no gradient, no plane
    np.testing.assert_allclose(onto_plane(points, normals, np.array([-5.0])), [[-0.1, -0.9, 0]], atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_the_targeted_loss_by_its_formula_and_autograd(count: int) -> None:
    logits = np.random.default_rng(0).normal(0, 1, (20, count)).astype(np.float32)
    y, aim = logits.argmax(1), logits.argmin(1)
    value, weights = targeted_dlr(logits, y, aim)
    z, rows = torch.from_numpy(logits).requires_grad_(), np.arange(20)
    ranked = z.sort(dim=1, descending=True).values
    spread = ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 if count >= 4 else 1.0
    expected = (z[rows, aim] - z[rows, y]) / spread
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(weights, torch.autograd.grad(expected.sum(), z)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 5])
def test_networks_of_few_classes(count: int, batch: int) -> None:
    """With one class nothing is aimed at; with two, both attacks break what gradients of the difference break."""
    network = Small(count)
    x, y = images(network, batch)
    for made in attacks(network, x, y, steps=20).values():
        assert made.shape == x.shape
        assert np.array_equal(made, x) or count > 1
        assert np.isfinite(made).all()


def test_classes_are_aimed_at_by_their_logits_and_broken_images_left_alone() -> None:
    network = Small(4)
    x, y = images(network, 8)
    assert likeliest_wrong(np.array([[1.0, 4.0, 2.0, 0.0]]), np.array([2])).tolist() == [[1, 0, 3]]
    other = x[(y != y[0]).argmax()]  # classified otherwise than the first image
    seen = []

    def attempt(chosen: np.ndarray, pairs: np.ndarray, places: np.ndarray) -> np.ndarray:
        seen.append(places.tolist())
        made = chosen.copy()
        made[places == 0] = other
        return made

    try_each_class(network, x, y, attempt)
    assert seen == [list(range(8)), list(range(1, 8)), list(range(1, 8))]


@pytest.mark.parametrize("method", ["apgd-t", "fab-t"])
def test_the_conditions(method: str) -> None:
    network = Small(4)
    x, y = images(network, 20)
    (made,) = resolved([entry(method, method, steps=20)], Attack(eps=EPS, step=EPS / 4), "triangle:1")
    attacked, predicted = gather(list(run(Suite(Source(network, "triangle:1"), (made,)), made, x, y, y, batch_size=7)))
    assert 0 < (predicted != y).mean() < 1
    assert len(x) < attacked.evaluations <= made.cost * len(x)
    assert "20 steps" in made.settings


def test_paper_holds_the_attacks_of_autoattack() -> None:
    methods = {line.method: line for line in TIERS["paper"].entries}
    assert methods["apgd"].values["steps"] == 100
    assert methods["square"].values["queries"] == 5000
    for line in (methods["apgd-t"], methods["fab-t"]):
        (made,) = resolved([line], Attack(eps=EPS, step=EPS / 4), "triangle:1")
        assert (made.steps, made.classes, made.surrogate) == (100, 9, "triangle:1")


def test_an_exported_networks_gradients_of_weighted_logits_are_torchs(bundle: Bundle, tmp_path: Path) -> None:
    model = TorchModel.from_bundle(bundle)
    x, rng = np.random.default_rng(0).random((3, *model.shape), np.float32), np.random.default_rng(1)
    weights = rng.normal(0, 1, model(x).shape).astype(np.float32)
    with TorchNetwork(model).attacker("triangle:1", loss="weighted", draws=1) as target:
        torchs = target(x, weights)
    with GraphAttacker(bundle.variant("fp32"), "triangle:1", loss="weighted") as attacker:
        ours = attacker(x, weights)
    for mine, theirs in zip(ours, torchs, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
