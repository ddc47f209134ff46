"""Dynamic LIF: the gain, and the loss on what an attack does to the last layer's current."""

import pytest
import torch
from conftest import T, small_recipe
from torch import Tensor

from mpdsgr_deploy.defences import Step, build_defended
from mpdsgr_deploy.defences.dlif import DynamicLIF, DynamicLIFSettings, DynamicNeurons, leaky_integral
from mpdsgr_deploy.snn import LIF, Observer, Trace
from mpdsgr_deploy.snn.surrogate import make_surrogate


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_gains_of_one_are_the_plain_neuron(reset: str) -> None:
    plain = LIF(tau=0.7, v_threshold=0.8, reset=reset, surrogate=make_surrogate("triangle", 0.9))
    dynamic = DynamicLIF(plain, 4)
    current = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    first, second = current.clone().requires_grad_(), current.clone().requires_grad_()
    expected, found = plain(first)[0], dynamic(second)[0]
    assert torch.equal(found, expected)
    for spikes in (expected, found):
        (spikes * torch.arange(4.0).view(4, 1, 1, 1, 1)).sum().backward()
    assert torch.equal(second.grad, first.grad)
    # d loss / d a_t = sum of I_t d loss / d I_t, at a = 1
    torch.testing.assert_close(dynamic.gain.grad, (current * first.grad).sum((1, 2, 3, 4)))


def test_each_gain_acts_on_its_own_step_by_hand() -> None:
    dynamic = DynamicLIF(LIF(tau=0.5, v_threshold=10.0, surrogate=make_surrogate("triangle")), 3)
    dynamic.gain.data = torch.tensor([1.0, 2.0, -0.5])
    _, states = dynamic(torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1))
    assert [s.u.item() for s in states] == [1, 6.5, 2.25]


def test_leaky_integral_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 4.0], [0.0, -1.0]])
    assert leaky_integral(x, 0.5).tolist() == [[1, 0], [2.5, 4], [1.25, 1]]


def step_on(x: Tensor, clean: Tensor) -> tuple[Step, list[int]]:
    """A step whose network is two layers of current, of which the second, three steps of the image's pixels, counts."""
    neuron = LIF(surrogate=make_surrogate("triangle"))
    passes: list[int] = []

    def forward(x: Tensor, observe: Observer | None) -> Tensor:
        passes.append(1)
        for layer, scale in (("first", 100.0), ("last", 2.0)):
            current = scale * torch.stack([x, x, x])
            observe(Trace(layer, None, neuron, neuron(current)[1], current))
        return x

    readings: list[Tensor] = []
    logits = forward(x, lambda trace: readings.append(trace.current))
    return Step(forward, x, torch.zeros(1), clean, logits, readings[-1:], 0, torch.Generator()), passes


def test_the_loss_by_hand() -> None:
    clean, x = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.4, 0.7]], requires_grad=True)
    step, passes = step_on(x, clean)
    term = DynamicNeurons(DynamicLIFSettings(rho=3.0, tau=0.5)).term(step)
    # the difference of the currents is (0.2, -0.4) at every step, and Y that times 1, 1.5, 1.75
    assert (term.name, term.weight, len(passes)) == ("perturbation", 3.0, 2)
    assert term.value.item() == pytest.approx((0.04 + 0.16) * (1 + 1.5**2 + 1.75**2) / 6)
    term.value.backward()
    # d / dx = 2 Y_t dY_t/dx / 6 and dY_t/dx = -2 times 1, 1.5, 1.75
    slope = -2 * 2 * (1 + 1.5**2 + 1.75**2) / 6
    assert x.grad.flatten().tolist() == pytest.approx([0.2 * slope, -0.4 * slope])


def test_the_absolute_norm_by_hand() -> None:
    step, _ = step_on(torch.tensor([[0.4, 0.7]]), torch.tensor([[0.5, 0.5]]))
    term = DynamicNeurons(DynamicLIFSettings(rho=3.0, tau=0.5, norm="l1")).term(step)
    assert term.value.item() == pytest.approx((0.2 + 0.4) * (1 + 1.5 + 1.75) / 6)


def test_without_an_attack_or_a_weight_no_pass_is_spent() -> None:
    image = torch.rand(1, 2)
    for x, rho in ((image, 1.0), (image + 0.1, 0.0)):
        step, passes = step_on(x, image)
        assert DynamicNeurons(DynamicLIFSettings(rho=rho)).term(step) is None
        assert len(passes) == 1


def test_every_layer_learns_gains_and_mixed_precision_keeps_the_currents_type() -> None:
    model, _ = build_defended(small_recipe(defence={"dlif": {}}), (1, 8, 8), 10)
    assert [layer.neuron.gain.tolist() for layer in model.layers()] == [[1] * T] * 3
    spikes, states = model.layers()[0].neuron(torch.randn(T, 4, 2, dtype=torch.bfloat16))
    assert {spikes.dtype, *(s.u.dtype for s in states)} == {torch.bfloat16}
