"""The steps of LIF neurons as one function are those of `lif`, one after the other."""

import itertools
from typing import Any

import pytest
import torch

from mpdsgr_deploy.snn.lif_state import LIFConstants
from mpdsgr_deploy.snn.multistep import multistep_lif
from mpdsgr_deploy.snn.neuron import LIFState, lif
from mpdsgr_deploy.snn.surrogate import make_surrogate, spike
from mpdsgr_deploy.surrogates import KINDS

T, B, C, W = 4, 3, 5, 2
CASES = list(itertools.product(KINDS, ("hard", "soft"), (False, True), (False, True), (False, True)))


def leaves(held: bool, resting: bool, learned: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    found = {"current": torch.randn(1 if held else T, B, C, W, generator=draw, dtype=torch.float64) + 0.7}
    if not resting:
        found["u"] = torch.randn(B, C, W, generator=draw, dtype=torch.float64)
        found["spikes"] = (torch.rand(B, C, W, generator=draw) > 0.5).double()
    if learned:
        found["tau"] = torch.rand(T, C, 1, generator=draw, dtype=torch.float64)
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def run(given: dict[str, torch.Tensor], fused: bool, name: str, reset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    current, tau, surrogate = given["current"], given.get("tau", 0.5), make_surrogate(name)
    state = LIFState(given["u"], given["spikes"]) if "u" in given else None
    if fused:
        hard = reset == "hard"
        return multistep_lif(current, state, LIFConstants(T, tau, 1.0, hard, surrogate))
    steps = current.unbind(0)
    steps = steps * T if len(steps) == 1 else steps
    states = lif(steps, state, tau=tau, v_threshold=1.0, reset=reset, surrogate=surrogate)
    return torch.stack([s.u for s in states]), torch.stack([s.spikes for s in states])


@pytest.mark.parametrize(("name", "reset", "held", "resting", "learned"), CASES)
def test_outputs_and_gradients_are_those_of_single_steps(
    name: str, reset: str, held: bool, resting: bool, learned: bool
) -> None:
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(T, B, C, W, generator=draw, dtype=torch.float64) for _ in range(2)]
    gradients = []
    outputs = []
    for fused in (False, True):
        given = leaves(held, resting, learned)
        found = run(given, fused, name, reset)
        sum((w * y).sum() for w, y in zip(weights, found, strict=True)).backward()
        outputs.append(found)
        gradients.append([tensor.grad for tensor in given.values()])
    for single, fused in zip(*outputs, strict=True):
        assert torch.equal(single, fused)
    for single, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, single, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_every_type_rounds_as_in_single_steps(reset: Any, dtype: torch.dtype, tau: float) -> None:
    current = (torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    surrogate = make_surrogate("triangle")
    u, spikes = multistep_lif(current, None, LIFConstants(8, tau, 1.0, reset == "hard", surrogate))
    states = lif(current.unbind(0), None, tau=tau, v_threshold=1.0, reset=reset, surrogate=surrogate)
    assert torch.equal(u, torch.stack([state.u for state in states]))
    assert torch.equal(spikes, torch.stack([state.spikes for state in states]))


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("used", [0, 1])
def test_a_loss_of_one_output_alone(reset: str, used: int) -> None:
    gradients = []
    for fused in (False, True):
        given = leaves(held=False, resting=True, learned=False)
        run(given, fused, "triangle", reset)[used].square().sum().backward()
        gradients.append(given["current"].grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("resting", [False, True])
def test_a_detached_reset_passes_no_gradient_through_its_spikes(hard: bool, resting: bool) -> None:
    surrogate, gradients = make_surrogate("sigmoid"), []
    for fused in (False, True):
        given = leaves(held=False, resting=resting, learned=False)
        u, spikes = given.get("u", torch.zeros(())), given.get("spikes", torch.zeros(()))
        if fused:
            state = None if resting else (u, spikes)
            constants = LIFConstants(T, 0.5, 1.0, hard, surrogate, detach_reset=True)
            _, out = multistep_lif(given["current"], state, constants)
        else:
            steps = []
            for current in given["current"]:
                reset = spikes.detach()
                u = 0.5 * (u * (1 - reset) if hard else u - reset) + current
                spikes = spike(u, 1.0, surrogate)
                steps.append(spikes)
            out = torch.stack(steps)
        out.square().sum().backward()
        gradients.append([given[name].grad for name in given if name != "spikes"])
        assert resting or given["spikes"].grad is None
    for single, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, single, rtol=1e-12, atol=1e-12)
