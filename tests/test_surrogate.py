import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad

from mpdsgr_deploy.snn.surrogate import SURROGATES, spike


def primitive(name: str, v: float) -> float:
    """Closed form of the surrogate's integral from -inf (or the support's edge) to v, at default parameters."""
    if name == "triangle":
        v = min(max(v, -1), 1)
        return (1 + v) ** 2 / 2 if v < 0 else 1 - (1 - v) ** 2 / 2
    if name == "rectangular":
        return min(max(v + 0.5, 0), 1)
    if name == "sigmoid":
        return 1 / (1 + math.exp(-4 * v))
    if name == "exponential":  # a = 0.5
        return math.exp(2 * v) / 2 if v < 0 else 1 - math.exp(-2 * v) / 2
    half = 1 / (10 * (1 + 10 * abs(v)))  # superspike, k = 10: total mass 2 / k
    return half if v < 0 else 2 / 10 - half


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("v", [-2.0, -0.7, -0.3, -0.01, 0.2, 0.45, 0.9, 3.0])
def test_derivative_matches_the_numeric_one(name: str, v: float) -> None:
    step = 1e-6
    numeric = (primitive(name, v + step) - primitive(name, v - step)) / (2 * step)
    found = SURROGATES[name]().derivative(torch.tensor(v, dtype=torch.float64)).item()
    assert found == pytest.approx(numeric, abs=1e-6)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("parameter", [0.5, 2.0])
def test_half_width_holds_the_claimed_mass(name: str, parameter: float) -> None:
    surrogate = SURROGATES[name](parameter)

    def slope(v: float) -> float:
        return surrogate.derivative(torch.tensor(v, dtype=torch.float64)).item()

    def mass(bound: float) -> float:
        edges = sorted({0.0, min(surrogate.half_width, bound), min(10.0, bound), bound})
        return sum(quad(slope, a, b, limit=500)[0] for a, b in pairwise(edges))

    finite = name in ("triangle", "rectangular")
    assert mass(surrogate.half_width) / mass(2e3) == pytest.approx(1.0 if finite else 0.95, rel=2e-3)


@pytest.mark.parametrize("name", SURROGATES)
def test_spike_is_the_step_forward_and_the_surrogate_backward(name: str) -> None:
    surrogate = SURROGATES[name]()
    u = torch.tensor([-1.0, 0.4, 0.999, 1.0, 1.3, 5.0], requires_grad=True)
    spikes = spike(u, 1.0, surrogate)
    assert spikes.tolist() == [0, 0, 0, 1, 1, 1]
    (3 * spikes.sum()).backward()
    assert torch.equal(u.grad, 3 * surrogate.derivative(u.detach() - 1.0))
    with torch.no_grad():
        assert torch.equal(spike(u, 1.0, surrogate), spikes)
