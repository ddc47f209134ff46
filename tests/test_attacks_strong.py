"""APGD, Square and SA-PGD on a trained spiking network, against formulas and other implementations."""

import foolbox
import numpy as np
import pytest
import torch
from conftest import small_recipe
from linear_model import EPS, draw, linear

from mpdsgr_deploy.attack_graph.adaptive import SHARPNESS
from mpdsgr_deploy.attacks import apgd, pgd, sa_pgd, square
from mpdsgr_deploy.attacks.torch_target import AdaptiveTorch, _adapting, cross_entropy, dlr, input_gradient
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.runtime.torch_model import TorchModel


@pytest.fixture(scope="module")
def spiking(bundle: Bundle) -> tuple[TorchModel, np.ndarray, np.ndarray]:
    images = load_test(Data(name="digits"))[:150]
    return TorchModel.from_bundle(bundle), images.unit(), images.classes


def broken(model: TorchModel, images: np.ndarray, y: np.ndarray) -> np.ndarray:
    return model(images).argmax(1) != y


def test_dlr_against_its_formula() -> None:
    logits, y = torch.tensor([[1.0, 4.0, 2.0, 0.0], [1.0, 4.0, 2.0, 0.0]]), torch.tensor([1, 2])
    assert dlr(logits, y).tolist() == pytest.approx([-(4 - 2) / (4 - 1), -(2 - 4) / (4 - 1)])


def test_apgd_is_as_strong_as_its_authors(spiking) -> None:
    oracle = pytest.importorskip("pyautoattack")
    model, _, _ = spiking
    images = load_test(Data(name="digits"))[:300]  # of half as many, another start breaks 0.03 more or fewer
    x, y = images.unit(), images.classes
    for loss, name in ((cross_entropy, "apgd-ce"), (dlr, "apgd-dlr")):
        ours = apgd(model.attacker(loss=loss), x, y, eps=EPS, steps=40, draw=draw)
        audit = oracle.AutoAttack(model._model, version="custom", attacks=[name], eps=EPS, seed=0)
        audit.apgd.n_restarts, audit.apgd.n_iter = 1, 40
        theirs = audit.run_standard_evaluation(torch.from_numpy(x), torch.from_numpy(y))[0].numpy()
        assert broken(model, ours, y).mean() >= broken(model, theirs, y).mean() - 0.03


def test_apgd_and_adaptive_sa_pgd_break_no_less_than_strong_pgd(spiking) -> None:
    model, x, y = spiking
    strong = pgd(model.attacker(), x, y, eps=EPS, step=EPS / 4, steps=40, draw=draw, keep="broken")
    reference = broken(model, strong, y).mean()
    for images in (
        apgd(model.attacker(), x, y, eps=EPS, steps=40, draw=draw),
        sa_pgd(model.adaptive_attacker(), x, y, eps=EPS, steps=40, draw=draw),
    ):
        assert np.abs(images - x).max() <= EPS + 1e-6
        assert broken(model, images, y).mean() >= reference - 0.02
    assert 0.1 < reference < 0.95


def test_adaptive_surrogates_by_hand() -> None:
    """The first evaluation moves M from 1 and D from 0 by a tenth; the slope is the arctangent's at that sharpness."""
    torch.manual_seed(0)
    model = build_model(small_recipe(), (1, 8, 8), 10)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    target = AdaptiveTorch(model, (1, 8, 8))
    first, state = target.step(x, y, target.start(4))
    assert torch.equal(first.logits, input_gradient(model, x, y).logits)
    potentials: dict[str, torch.Tensor] = {}
    model(x, lambda trace: potentials.update({trace.layer: torch.stack([s.u for s in trace.states], 1).detach()}))
    for name, u in potentials.items():
        distance = (u - 1).abs()
        mean = 0.9 + 0.1 * distance
        deviation = 0.1 * (distance - mean).abs()
        torch.testing.assert_close(state[f"mean/{name}"], mean)
        torch.testing.assert_close(state[f"deviation/{name}"], deviation)
        v = (u[:, 1] - 1).requires_grad_()
        sharpness = SHARPNESS / (mean + 1.5 * deviation)[:, 1]
        smooth = torch.atan(torch.pi / 2 * sharpness * v) / torch.pi
        (slope,) = torch.autograd.grad(smooth.sum(), v)
        found = _adapting(name, target.start(4), dict(target.start(4)))(1).derivative(v.detach())
        torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-5)
    assert all(layer.neuron.stepwise is None for layer in model.layers())


def test_adaptive_gradients_do_not_depend_on_the_rest_of_the_batch(spiking) -> None:
    model, x, y = spiking
    together = sa_pgd(model.adaptive_attacker(), x[:40], y[:40], eps=EPS, steps=10)
    apart = [
        sa_pgd(model.adaptive_attacker(), x[i : i + 10], y[i : i + 10], eps=EPS, steps=10) for i in range(0, 40, 10)
    ]
    assert (broken(model, together, y[:40]) == broken(model, np.concatenate(apart), y[:40])).mean() > 0.95


class TestSquare:
    def test_is_as_strong_as_its_authors(self, spiking) -> None:
        model, x, y = spiking
        mine = square(model, x[:100], y[:100], eps=EPS, queries=300).images
        oracle = pytest.importorskip("pyautoattack").square
        audit = oracle.SquareAttack(model._model, eps=EPS, n_queries=298, seed=0, device="cpu", resc_schedule=True)
        theirs = audit.perturb(torch.from_numpy(x[:100]), torch.from_numpy(y[:100])).numpy()
        assert broken(model, mine, y[:100]).mean() >= broken(model, theirs, y[:100]).mean() - 0.05

    def test_is_stronger_than_foolboxs_noise(self, spiking) -> None:
        model, x, y = spiking
        mine = square(model, x, y, eps=EPS, queries=100).images
        attack = foolbox.attacks.LinfRepeatedAdditiveUniformNoiseAttack(repeats=100)
        oracle = foolbox.PyTorchModel(model._model, bounds=(0, 1))
        torch.manual_seed(0)
        _, _, success = attack(oracle, torch.from_numpy(x), torch.from_numpy(y), epsilons=EPS)
        assert broken(model, mine, y).mean() > success.float().mean().item()

    def test_splitting_the_batch_changes_nothing(self) -> None:
        target, x, y = linear()
        target.w = np.round(target.w * 8) / 8  # sums without rounding, whatever the order
        x = np.round(x * 64) / 64
        y, numbers = target(x).argmax(1), np.arange(len(x)) * 7
        whole = square(target, x, y, eps=1 / 16, queries=80, seed=3, indices=numbers)
        order = np.random.default_rng(0).permutation(len(x))
        for part in np.array_split(order, 3):
            found = square(target, x[part], y[part], eps=1 / 16, queries=80, seed=3, indices=numbers[part])
            assert np.array_equal(found.images, whole.images[part])
            assert np.array_equal(found.queries, whole.queries[part])
        other = square(target, x, y, eps=1 / 16, queries=80, seed=4, indices=numbers)
        assert not np.array_equal(other.images, whole.images)

    def test_counts_its_questions_and_keeps_to_its_budget(self) -> None:
        target, x, y = linear()
        asked: list[int] = []

        def counted(images: np.ndarray) -> np.ndarray:
            asked.append(len(images))
            return target(images)

        found = square(counted, x, y, eps=EPS, queries=40)
        assert sum(asked) == found.queries.sum()
        assert (found.queries[found.standing] == 40).all()
        assert found.queries.min() >= 1
        assert np.array_equal(found.standing, target(found.images).argmax(1) == y)
        wrong = square(target, x, 1 - y, eps=EPS)
        assert (wrong.queries == 1).all()
        assert np.array_equal(wrong.images, x)

    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 17), (1, 9, 3), (70, 2, 2)])
    def test_any_shape_of_image(self, shape: tuple[int, int, int]) -> None:
        """Also one narrower than the square, and more channels than a word has bits."""
        target, x, y = linear(shape, count=30)
        found = square(target, x, y, eps=EPS, queries=400)
        assert np.array_equal(~found.standing, target.gap(x) < 0) or np.prod(shape) > 100
        assert found.standing.sum() <= (target(x) != 0).sum()
        assert np.abs(found.images - x).max() <= EPS + 1e-6

    def test_moves_on_a_plateau(self) -> None:
        """The logits change only once five of sixteen pixels have moved: a search for lower margins never does."""

        def plateau(x: np.ndarray) -> np.ndarray:
            up = (x > 0.5).sum((1, 2, 3)) >= 13
            return np.stack([np.where(up, 0.0, 1.0), np.full(len(x), 0.5)], 1).astype(np.float32)

        x, y = np.full((20, 1, 4, 4), 0.5, np.float32), np.zeros(20, np.int64)
        assert square(plateau, x, y, eps=EPS, queries=600).standing.sum() <= 2
