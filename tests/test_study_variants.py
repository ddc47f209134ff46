"""Variants of the regulariser that studies compare, each by its formula."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import T, small_recipe
from scipy.stats import norm as normal
from torch import nn

from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.defences.base import Step, Term
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.experiments import explain
from mpdsgr_deploy.snn import LIF, SpikingLayer, TdBN, Trace
from mpdsgr_deploy.snn.surrogate import make_surrogate


def step_of(model: nn.Module, defence: object, x: torch.Tensor, clean: torch.Tensor) -> Step:
    """A training step of a network in eval mode, as `batch_loss` makes it."""
    readings: list[object] = []
    y = torch.arange(len(x)) % 10
    logits = model(x, lambda trace: readings.append(defence.read(trace)))
    return Step(lambda x, observe: model(x, observe), x, y, clean, logits, readings, 0, torch.Generator())


def built(**settings: object) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model, (defence,) = build_defended(small_recipe(defence={"mpd-sgr-variant": settings}), (1, 8, 8), 10)
    return model, defence


X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_plain_variant_is_the_regulariser_of_the_package() -> None:
    for estimator in ("theorem", "empirical"):
        torch.manual_seed(0)
        recipe = small_recipe(defence={"mpd-sgr": {"estimator": estimator, "eta": 0.5}})
        model, (original,) = build_defended(recipe, (1, 8, 8), 10)
        expected = original.term(step_of(model, original, X, X))
        again, variant = built(estimator=estimator)
        found = variant.term(step_of(again, variant, X, X))
        assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-6)
        assert found.weight == expected.weight


def test_only_what_is_asked_for_receives_the_gradient() -> None:
    """By the theorem the mean is a matter of beta, and the deviation of lambda."""
    for reaches, silent, reached in (("mean", "weight", "bias"), ("deviation", "bias", "weight")):
        model, variant = built(estimator="theorem", reaches=reaches)
        variant.term(step_of(model, variant, X, X)).value.backward()
        norms = [layer.norm for layer in model.layers()]
        assert all(getattr(norm, reached).grad.abs().max() > 0 for norm in norms)
        assert all(getattr(norm, silent).grad is None or not getattr(norm, silent).grad.any() for norm in norms)


def test_a_window_around_zero_and_a_bound_on_the_deviation() -> None:
    torch.manual_seed(0)
    current = 0.3 + 2.0 * torch.randn(1, 4000, 1)
    neuron = LIF(tau=0.5, surrogate=make_surrogate("triangle"))
    trace = Trace("layer", TdBN(1, v_threshold=1.0), neuron, neuron(current)[1], current)
    mu, sigma = current.mean().item() - 1, current.std(unbiased=False).item()

    def value(**settings: object) -> float:
        _, variant = built(**settings)
        step = SimpleNamespace(readings=[variant.read(trace)], epoch=0)
        return variant.term(step).value.item()

    def mass(mu: float, sigma: float) -> float:
        return normal.cdf((mu + 1) / sigma) - normal.cdf((mu - 1) / sigma)

    assert value() == pytest.approx(mass(mu, sigma), rel=1e-4)
    assert value(centre="zero") == pytest.approx(mass(mu + 1, sigma), rel=1e-4)
    assert value(widest=1.5) == pytest.approx(mass(mu, 1.5), rel=1e-4)
    rate = normal.cdf(mu / sigma)
    assert value(floor=0.9) == pytest.approx(mass(mu, sigma) + 1 - rate / 0.9, rel=1e-4)
    assert value(floor=0.1) == pytest.approx(mass(mu, sigma), rel=1e-4)


def test_eta_moves_over_the_epochs() -> None:
    for anneal, expected in (("none", [2, 2, 2]), ("in", [0, 2 / 3, 4 / 3]), ("out", [2, 4 / 3, 2 / 3])):
        model, variant = built(eta=2.0, anneal=anneal)
        step = step_of(model, variant, X, X)
        assert [variant.term(step._replace(epoch=e)).weight for e in range(3)] == pytest.approx(expected)


def test_a_membrane_margin_pushes_each_neuron_to_its_own_side() -> None:
    recipe = small_recipe(defence={"membrane-margin": {"width": 0.5}})
    _, (margin,) = build_defended(recipe, (1, 8, 8), 10)
    current = torch.tensor([0.0, 0.9, 1.1, 2.0]).view(1, 4, 1).requires_grad_()
    neuron = LIF(tau=0.5, surrogate=make_surrogate("triangle"))
    trace = Trace("layer", None, neuron, neuron(current)[1], current)
    step = SimpleNamespace(readings=[margin.read(trace)], logits=None, y=None)
    value = margin.term(step).value
    sigma = current.std(unbiased=False).item()
    assert value.item() == pytest.approx(2 * (1 - 0.1 / (0.5 * sigma)) / 4, rel=1e-4)
    value.backward()
    assert current.grad.sign().flatten()[1:3].tolist() == [1, -1]  # descent: 0.9 falls and 1.1 rises
    # a scale of all potentials around the threshold changes nothing
    assert ((current - 1) * current.grad).sum().item() == pytest.approx(0, abs=1e-5)


def salient_step(name: str, clean: torch.Tensor, **settings: object) -> tuple[Step, Term, list[torch.Tensor]]:
    """A step on X, attacked from `clean`, the term of a defence, and how much each current moves the margin."""
    torch.manual_seed(0)
    model, defences = build_defended(small_recipe(defence={"at": {}, name: settings}), (1, 8, 8), 10)
    step = step_of(model, defences[-1], X, clean)
    term = defences[-1].term(step)
    index, top = torch.arange(len(X)), step.logits.detach().clone()
    top[index, step.y] = -torch.inf
    currents = [reading[0] for reading in step.readings]
    margin = (step.logits[index, step.y] - step.logits[index, top.argmax(1)]).sum()
    margin.backward(inputs=currents, retain_graph=True)
    return step, term, [current.grad.abs() for current in currents]


def test_a_salient_neuron_weighs_by_the_margins_gradient() -> None:
    step, term, weights = salient_step("membrane-margin", X, salient=True)
    means = [(w * x).sum() / w.sum() for w, (_, x) in zip(weights, step.readings, strict=True)]
    assert term.value.item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-4)


def test_a_salient_channel_weighs_by_the_margins_gradient_in_what_is_reached() -> None:
    clean = (X + 0.1).clamp(0, 1)
    step, term, weights = salient_step("salient-reach", clean)
    met = [own for _, own in step.readings]
    other: list[Trace] = []
    step.forward(clean, other.append)
    means = []
    for own, trace, weight in zip(met, other, weights, strict=True):
        moved = torch.stack([a - b.u for a, b in zip(own.potentials, trace.states, strict=True)]).detach()
        width = moved.square().mean((1, 3, 4)).sqrt().numpy()
        mu, sigma = (moment.detach().numpy() for moment in own.moments)
        mass = normal.cdf((mu + width) / sigma) - normal.cdf((mu - width) / sigma)
        means.append(np.average(mass, weights=weight.mean((1, 3, 4)).numpy()))
    assert term.value.item() == pytest.approx(np.mean(means), rel=1e-3)
    with pytest.raises(InputError, match=r"add \[defence.at\]"):
        build_defended(small_recipe(defence={"salient-reach": {}}), (1, 8, 8), 10)


def test_the_largest_gain_is_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    norm = TdBN(3, v_threshold=1.0).eval()
    norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0]))
    norm.running_mean.fill_(0.7)
    nn.init.constant_(norm.bias, 0.4)
    layer = SpikingLayer(
        "conv1", nn.Conv2d(2, 3, 3, padding=1), norm, LIF(tau=0.5, surrogate=make_surrogate("triangle"))
    )
    with torch.no_grad():
        zero = norm(layer.synapse(torch.zeros(1, 2, 5, 5)))
        columns = [(norm(layer.synapse(e.view(1, 2, 5, 5))) - zero).flatten() for e in torch.eye(50)]
    expected = torch.linalg.matrix_norm(torch.stack(columns), 2).item()
    assert explain.largest_gain(layer, (2, 5, 5)) == pytest.approx(expected, rel=1e-3)


def test_factors_of_a_layer_by_hand() -> None:
    torch.manual_seed(0)
    recipe = small_recipe(neuron={"tau": 0.5})
    model, _ = build_defended(recipe, (1, 8, 8), 10)
    model.eval()
    images = load_test(recipe.data)[:5]
    first, *_ = explain.factors(model, images)
    traces: list[Trace] = []
    model(torch.from_numpy(images.unit()), traces.append)
    v = torch.stack([u for u, _ in traces[0].states]) - 1
    assert first.surrogate == pytest.approx((1 - v.abs()).clamp(min=0).square().mean().sqrt().item(), rel=1e-5)
    assert first.leak == pytest.approx(sum(0.5**t for t in range(T)))
    assert first.firing_rate == pytest.approx((v >= 0).float().mean().item())
    # its input is the image
    assert first.density == pytest.approx(1 / images.unit().std(), rel=1e-5)
    assert first.scale == pytest.approx(model.layers()[0].norm.weight.square().mean().sqrt().item())
    assert first.scale * first.density * first.filter == pytest.approx(first.weights)
