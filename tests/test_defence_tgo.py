"""TGO's constraint: the hinge by hand, the sum over layers, and the weight over the epochs."""

import pytest
import torch
from conftest import small_recipe

from mpdsgr_deploy.defences import Step, build_defended
from mpdsgr_deploy.defences.tgo import ThresholdGuard, ThresholdGuardSettings, hinge
from mpdsgr_deploy.snn import LIF, Trace
from mpdsgr_deploy.snn.surrogate import make_surrogate


def test_the_hinge_by_hand() -> None:
    u = torch.tensor([[1.0, 0.75], [1.5, -3.0]], requires_grad=True)
    value = hinge(u, 1.0, 0.5)
    assert value.item() == pytest.approx((0.5 + 0.25 + 0 + 0) / 4)
    value.backward()
    assert u.grad[0, 1] == 0.25  # descent moves it away from the threshold, downwards
    assert u.grad[1].tolist() == [0, 0]


def step_with(readings: list[torch.Tensor], epoch: int) -> Step:
    x = torch.zeros(1, 1, 2, 2)
    return Step(lambda x, observe: x, x, torch.zeros(1), x, x, readings, epoch, torch.Generator())


def test_layers_add_up_and_steps_are_averaged() -> None:
    guard = ThresholdGuard(ThresholdGuardSettings(lam=2.0, delta=0.5))
    guard.check(small_recipe(training={"epochs": 3}))
    neuron = LIF(tau=0.5, v_threshold=1.0, surrogate=make_surrogate("triangle"))
    current = torch.tensor([0.9, 0.45]).view(2, 1, 1)  # U is 0.9, then 0.9
    layer = guard.read(Trace("conv1", None, neuron, neuron(current)[1], current))
    assert layer.item() == pytest.approx(0.4)
    for epoch, weight in ((0, 0.0), (1, 1.0), (2, 2.0)):
        term = guard.term(step_with([layer, 2 * layer], epoch))
        assert term.value.item() == pytest.approx(1.2)
        assert term.weight == pytest.approx(weight)


def test_one_epoch_has_no_weight_and_a_gradient_reaches_the_first_layer() -> None:
    recipe = small_recipe(defence={"tgo": {}}, training={"epochs": 1})
    torch.manual_seed(0)
    model, (guard,) = build_defended(recipe, (1, 8, 8), 10)
    readings: list[torch.Tensor] = []
    model(torch.rand(4, 1, 8, 8), lambda trace: readings.append(guard.read(trace)))
    term = guard.term(step_with(readings, 0))
    assert len(readings) == len(model.layers())
    term.value.backward()
    assert model.layers()[0].synapse.weight.grad.abs().sum() > 0
    assert term.weight == 0
