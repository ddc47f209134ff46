"""FEEL's learned leaks; its frequency encoding is tested with the encodings."""

import pytest
import torch
from conftest import T, small_recipe

from mpdsgr_deploy.defences import build_defended, make_defences
from mpdsgr_deploy.defences.feel import LeakyLIF
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.mpd import ESTIMATORS, MEASURES, layer_value, mean_of_layers
from mpdsgr_deploy.snn import LIF, Trace
from mpdsgr_deploy.snn.surrogate import make_surrogate


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_constant_leaks_are_the_plain_neuron(reset: str) -> None:
    plain = LIF(tau=0.7, v_threshold=0.8, reset=reset, surrogate=make_surrogate("triangle", 0.9))
    leaky = LeakyLIF(plain, 4, (3, 5, 5), 0.7)
    current = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    first, second = current.clone().requires_grad_(), current.clone().requires_grad_()
    expected, found = plain(first)[0], leaky(second)[0]
    assert torch.equal(found, expected)
    for spikes in (expected, found):
        (spikes * torch.arange(4.0).view(4, 1, 1, 1, 1)).sum().backward()
    assert torch.equal(second.grad, first.grad)


def test_each_leak_acts_on_its_own_step_and_neuron_by_hand() -> None:
    leaky = LeakyLIF(LIF(v_threshold=10.0, surrogate=make_surrogate("triangle")), 3, (2,), 1.0)
    leaky.leaks.data = torch.tensor([[9.0, 9.0], [0.5, 0.25], [0.0, -1.0]])  # the first acts on a state at rest
    _, states = leaky(torch.ones(3, 1, 2))
    assert [s.u.flatten().tolist() for s in states] == [[1, 1], [1.5, 1.25], [1, -0.25]]


def test_every_layer_learns_leaks_of_the_shape_of_its_neurons() -> None:
    recipe = small_recipe(defence={"feel": {}}, encoding={"name": "frequency"})
    torch.manual_seed(0)
    model, _ = build_defended(recipe, (1, 8, 8), 10)
    leaks = [layer.neuron.leaks for layer in model.layers()]
    assert [tuple(p.shape) for p in leaks] == [(T, 8, 8, 8), (T, 16, 4, 4), (T, 16, 4, 4)]
    assert all((p == 1).all() for p in leaks)
    model(torch.rand(16, 1, 8, 8)).square().sum().backward()
    for p in leaks:
        assert p.grad[0].abs().max() == 0  # at rest there is nothing to leak
        reached = (p.grad[1:] != 0).float().mean((1, 2, 3))
        assert (reached > 0.5).all()  # the others' membranes were reset by a spike or lie outside every window


def test_mixed_precision_keeps_the_currents_type() -> None:
    leaky = LeakyLIF(LIF(surrogate=make_surrogate("triangle")), 2, (3,), 1.0)
    spikes, states = leaky(torch.randn(2, 4, 3, dtype=torch.bfloat16))
    assert {spikes.dtype, *(s.u.dtype for s in states)} == {torch.bfloat16}


def test_the_theorem_does_not_speak_of_learned_leaks() -> None:
    recipe = small_recipe(defence={"feel": {}}, encoding={"name": "frequency"})
    model, _ = build_defended(recipe, (1, 8, 8), 10)
    traces: list[Trace] = []
    model(torch.rand(2, 1, 8, 8), traces.append)
    with pytest.raises(InputError, match="do not change over time"):
        mean_of_layers([layer_value(trace, ESTIMATORS["theorem"], MEASURES["overlap"]) for trace in traces])


def test_the_encoding_must_be_frequency() -> None:
    with pytest.raises(InputError, match=r"not direct; set encoding\.name = 'frequency'"):
        make_defences(small_recipe(defence={"feel": {}}))
