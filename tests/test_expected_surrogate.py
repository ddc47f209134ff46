"""The mean surrogate gradient over a Gaussian, against numerical integration, Monte Carlo and finite differences."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.mpd import SIGMA_FLOOR, Moments, expected_gradient, overlap
from mpdsgr_deploy.snn.surrogate import Surrogate, make_surrogate
from mpdsgr_deploy.surrogates import KINDS

MU = (-3.0, -1.1, -0.5, -0.03, 0.0, 0.2, 0.9, 3.0)
SIGMA = (0.05, 0.3, 1.0, 5.0)


def integrated(surrogate: Surrogate, mu: float, sigma: float) -> float:
    """E[surrogate'(V)] by adaptive quadrature, cut at the kinks and within 9 sigma of the mean."""

    def integrand(v: float) -> float:
        density = math.exp(-(((v - mu) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        return surrogate.derivative(torch.tensor(v, dtype=torch.float64)).item() * density

    low, high = mu - 9 * sigma, mu + 9 * sigma
    kinks = (-surrogate.half_width, 0.0, surrogate.half_width, mu)
    edges = [low, *sorted(kink for kink in kinks if low < kink < high), high]
    return sum(quad(integrand, a, b, limit=200)[0] for a, b in pairwise(edges))


@pytest.mark.parametrize("parameter", [None, 0.5])
@pytest.mark.parametrize("name", KINDS)
def test_against_quadrature(name: str, parameter: float | None) -> None:
    """From a Gaussian twenty times narrower than the window to one ten times wider, in double and in single."""
    surrogate = make_surrogate(name) if parameter is None else make_surrogate(name, parameter)
    mu, sigma = torch.cartesian_prod(torch.tensor(MU), torch.tensor(SIGMA)).unbind(1)
    expected = [integrated(surrogate, m, s) for m, s in zip(mu.double().tolist(), sigma.double().tolist(), strict=True)]
    assert surrogate.expected(mu.double(), sigma.double()).numpy() == pytest.approx(expected, abs=1e-4)
    assert surrogate.expected(mu, sigma).numpy() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_against_monte_carlo(name: str) -> None:
    surrogate = make_surrogate(name)
    samples = np.random.default_rng(0).normal(0, 1, 400_000)
    for mu, sigma in ((0.3, 0.2), (-0.6, 1.5)):
        slopes = surrogate.derivative(torch.from_numpy(mu + sigma * samples)).numpy()
        found = surrogate.expected(torch.tensor(mu), torch.tensor(sigma)).item()
        assert found == pytest.approx(slopes.mean(), abs=4 * slopes.std() / math.sqrt(len(samples)))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_in_mu_and_sigma(name: str) -> None:
    mu, sigma = torch.cartesian_prod(torch.tensor(MU), torch.tensor(SIGMA)).double().unbind(1)
    assert torch.autograd.gradcheck(make_surrogate(name).expected, (mu.requires_grad_(), sigma.requires_grad_()))


@pytest.mark.parametrize("name", KINDS)
def test_a_vanishing_sigma_gives_the_surrogate_itself(name: str) -> None:
    surrogate = make_surrogate(name)
    mu = torch.tensor([-3.0, -0.4, 0.0, 0.3, 0.95, 3.0], requires_grad=True)
    sigma = torch.full_like(mu, SIGMA_FLOOR).requires_grad_()
    found = surrogate.expected(mu, sigma)
    torch.testing.assert_close(found, surrogate.derivative(mu), rtol=0, atol=1e-4)
    found.sum().backward()
    assert torch.isfinite(mu.grad).all()
    assert torch.isfinite(sigma.grad).all()


@pytest.mark.parametrize("name", KINDS)
def test_as_a_measure_it_is_a_share_of_the_peak(name: str) -> None:
    surrogate = make_surrogate(name, 3.0)
    at_peak = Moments(torch.zeros(1, 1), torch.full((1, 1), SIGMA_FLOOR))
    assert expected_gradient(at_peak, surrogate).item() == pytest.approx(1, abs=1e-4)


def test_how_it_relates_to_the_overlap() -> None:
    """Equal for the rectangular surrogate; for the others a constant share of it where the Gaussian is wide."""
    moments = Moments(torch.randn(4, 5), torch.rand(4, 5) + 0.1)
    for a in (0.5, 2.0):
        torch.testing.assert_close(
            expected_gradient(moments, make_surrogate("rectangular", a)),
            overlap(moments, make_surrogate("rectangular", a)),
        )
    wide = Moments(torch.zeros(1, 1), torch.full((1, 1), 40.0))
    for name, share in (("triangle", 0.5), ("sigmoid", 0.546), ("superspike", 0.0526)):
        surrogate = make_surrogate(name)
        ratio = (expected_gradient(wide, surrogate) / overlap(wide, surrogate)).item()
        assert ratio == pytest.approx(share, rel=0.02), name


def test_a_surrogate_without_a_known_mean_is_refused() -> None:
    surrogate = Surrogate("mine", make_surrogate("triangle").derivative, 1.0)
    with pytest.raises(InputError, match="'mine' is not known; set measure = 'overlap'"):
        expected_gradient(Moments(torch.zeros(1, 1), torch.ones(1, 1)), surrogate)
