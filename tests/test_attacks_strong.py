"""APGD, Square, SA-PGD and restarts against closed forms, planted models and other implementations."""

from pathlib import Path

import foolbox
import numpy as np
import pytest
import torch
from conftest import small_recipe

from mpdsgr_deploy.attack_graph.adaptive import SHARPNESS
from mpdsgr_deploy.attacks import SquareState, apgd, hart, pgd, sa_pgd, square
from mpdsgr_deploy.attacks.adaptive_torch import AdaptiveTorch, _adapting
from mpdsgr_deploy.attacks.apgd import checkpoints
from mpdsgr_deploy.attacks.counting import CountedGradients
from mpdsgr_deploy.attacks.torch_target import cross_entropy, dlr, input_gradient
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.protocols import Array, Gradient, State
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.runtime.torch_model import TorchModel

EPS = 0.1


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


class Linear:
    """Two classes, logits (0, w.x + b), as a Predictor, a Differentiable and an Adaptive in one."""

    def __init__(self, w: np.ndarray, b: float) -> None:
        self.w, self.b = w.astype(np.float32), np.float32(b)

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        kind = torch if isinstance(x, torch.Tensor) else np
        w = kind.asarray(self.w)
        value = (x * w).sum((1, 2, 3)) + self.b
        logits = kind.stack([kind.zeros_like(value), value], 1)
        if y is None:
            return logits
        sign = kind.where(y == 1, -1.0, 1.0)
        slope = sign / (1 + kind.exp(-sign * value))
        return Gradient(logits, kind.log1p(kind.exp(sign * value)), slope[:, None, None, None] * w)

    def start(self, count: int) -> State:
        return {"rows": np.arange(count)}

    def step(self, x: Array, y: Array, state: State) -> tuple[Gradient, State]:
        assert len(state["rows"]) == len(x)
        return self(x, y), state

    def gap(self, x: np.ndarray) -> np.ndarray:
        """By how much eps would have to exceed or fall short of breaking each image, in units of |w|_1."""
        value = (x.astype(np.float64) * self.w).sum((1, 2, 3)) + self.b
        return np.abs(value) / np.abs(self.w).sum() - EPS


def linear(shape: tuple[int, int, int] = (2, 3, 4), count: int = 120) -> tuple[Linear, np.ndarray, np.ndarray]:
    """Images so far from 0 and 1 that the minimal perturbation is |w.x + b| / |w|_1, and not just at eps."""
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, shape)
    w += 0.3 * np.sign(w)
    target = Linear(w, 0.0)
    x = rng.uniform(0.2, 0.8, (count, *shape)).astype(np.float32)
    x += np.float32(0.1) * rng.uniform(-1, 1, (count, 1, 1, 1)).astype(np.float32) * np.sign(w).astype(np.float32)
    target.b = np.float32(-np.median((x * target.w).sum((1, 2, 3))))
    x = x[np.abs(target.gap(x)) > 0.01]
    return target, x, target(x).argmax(1)


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
    counted = {name: CountedGradients(target) for name in ("apgd", "sa-pgd")}
    right = (y + 1) % 2  # every image is "broken" before the first step
    for name, target in counted.items():
        ATTACKS[name](target, x, right)
        assert target.samples == len(x)
        ATTACKS[name](target, x, y)
        assert 2 * len(x) < target.samples < 22 * len(x)


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
            target, rng = CountedGradients(hills), np.random.default_rng(0)
            found = pgd(
                target, x, y, eps=EPS, step=EPS / 4, steps=8, keep=keep, restarts=restarts,
                draw=lambda shape, rng=rng: rng.uniform(-1, 1, shape).astype(np.float32),
            )  # fmt: skip
            left.append((hills(found, y).logits.argmax(1) == y).sum())
            cost.append(target.samples)
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
    model, x, y = spiking
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

    def test_resumed_from_a_file_it_ends_where_it_would_have(self, spiking, tmp_path: Path) -> None:
        model, x, y = spiking
        whole = square(model, x[:60], y[:60], eps=EPS, queries=150)
        saved: list[SquareState] = []
        square(model, x[:60], y[:60], eps=EPS, queries=150, save=saved.append, every=70)
        assert [int(state.proposals) for state in saved[:2]] == [70, 140]
        np.savez(tmp_path / "state.npz", **saved[0]._asdict())
        with np.load(tmp_path / "state.npz") as file:
            resumed = square(model, x[:60], y[:60], eps=EPS, queries=150, state=SquareState(**file))
        for a, b in zip(resumed, whole, strict=True):
            assert np.array_equal(a, b)
        assert saved[0].proposals == 70  # what was saved is left untouched

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
