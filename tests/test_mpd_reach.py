"""MPD-SGR with the window that the training attack reaches."""

import numpy as np
import pytest
import torch
from conftest import small_recipe
from scipy.stats import norm as normal
from torch import nn

from mpdsgr_deploy.defences import build_defended, make_defences
from mpdsgr_deploy.defences.base import Defence, Step
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.mpd import empirical, reach, theorem
from mpdsgr_deploy.snn import Trace

X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CLEAN = (X + 0.1).clamp(0, 1)


def built(**settings: object) -> tuple[nn.Module, Defence]:
    torch.manual_seed(0)
    recipe = small_recipe(defence={"at": {}, "mpd-sgr": {"window": "reach", "estimator": "empirical", **settings}})
    model, (_, defence) = build_defended(recipe, (1, 8, 8), 10)
    return model, defence


def term(model: nn.Module, defence: Defence, clean: torch.Tensor) -> torch.Tensor:
    """What a training step on X, attacked from `clean`, adds to the loss, without eta."""
    readings = []
    logits = model(X, lambda trace: readings.append(defence.read(trace)))
    met = [reading for reading in readings if reading is not None]
    step = Step(model, X, torch.arange(8), clean, logits, met, 0, torch.Generator())
    return defence.term(step).value


def test_how_far_images_move_potentials_by_hand() -> None:
    u = [torch.tensor([[1.0, 5.0], [2.0, 5.0]]), torch.zeros(2, 2)]  # two steps of [B = 2, C = 2]
    v = [torch.tensor([[4.0, 5.0], [6.0, 5.0]]), torch.ones(2, 2)]
    assert reach(u, v).tolist() == [pytest.approx([12.5**0.5, 1e-6]), pytest.approx([1, 1])]
    images = torch.arange(8.0).view(1, 2, 2, 2)  # [B, C, H, W]
    assert reach([images], [torch.zeros_like(images)]).tolist() == [pytest.approx([(14 / 4) ** 0.5, (126 / 4) ** 0.5])]


@pytest.mark.parametrize("estimator", ["theorem", "empirical"])
def test_the_term_is_the_overlap_with_that_window(estimator: str) -> None:
    model, defence = built(estimator=estimator)
    traces: list[list[Trace]] = [[], []]
    for images, into in zip((X, CLEAN), traces, strict=True):
        model(images, into.append)
    layers = []
    for own, other in zip(*traces, strict=True):
        moments = {"theorem": theorem, "empirical": empirical}[estimator](own)
        mu, sigma = (moment.detach().numpy() for moment in moments)
        moved = np.stack([(a.u - b.u).detach().numpy() for a, b in zip(own.states, other.states, strict=True)])
        width = np.sqrt((moved**2).mean((1, 3, 4)))
        layers.append((normal.cdf((mu + width) / sigma) - normal.cdf((mu - width) / sigma)).mean())
    assert term(model, defence, CLEAN).item() == pytest.approx(np.mean(layers), rel=1e-3)


def test_images_that_move_nothing_cost_nothing_and_every_weight_is_reached_by_others() -> None:
    model, defence = built()
    assert term(model, defence, X).item() < 1e-5
    term(model, defence, CLEAN).backward()
    assert all(layer.synapse.weight.grad.abs().max() > 0 for layer in model.layers())


def test_potentials_that_grow_as_a_whole_do_not_change_it() -> None:
    """What empties a window of fixed width: u and its threshold twice as large."""
    u, v = (torch.randn(1, 1000, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for scale in (1.0, 2.0):
        width = reach([*(scale * u)], [*(scale * v)])[0]
        sigma, mu = scale * u[0].std(0), scale * (u[0].mean(0) - 1)
        mass = normal.cdf(((mu + width) / sigma).numpy()) - normal.cdf(((mu - width) / sigma).numpy())
        if scale == 1:
            expected = mass
    assert mass == pytest.approx(expected, rel=1e-5)


def test_it_needs_an_attack_and_is_an_overlap() -> None:
    with pytest.raises(InputError, match=r"add \[defence.at\]"):
        make_defences(small_recipe(defence={"mpd-sgr": {"window": "reach"}}))
    with pytest.raises(InputError, match="leave out measure"):
        make_defences(small_recipe(defence={"at": {}, "mpd-sgr": {"window": "reach", "measure": "expected-gradient"}}))
