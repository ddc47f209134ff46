"""E[surrogate'(V)] for V ~ N(mu, sigma^2): the mean surrogate gradient of neurons with Gaussian membrane potentials.

The triangle and the rectangle have closed forms. The other kinds are scale mixtures of Gaussians,

    surrogate'(v) = integral of w(s) exp(-v^2 / 2 s^2) d ln s,

so a fixed quadrature over s turns the mean into a short sum of Gaussians, for any sigma. The only error is that of the
quadrature of the surrogate itself, at most 3e-5 of its peak, and the error of a mean is not larger.

Functions take tensors mu and sigma of one shape, return a tensor of this shape, and are differentiable in both.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

Expectation = Callable[[Tensor, Tensor], Tensor]
Mixture = tuple[tuple[float, ...], tuple[float, ...]]  # scales s and weights w(s) d ln s, for a surrogate of unit scale


def normal_cdf(z: Tensor) -> Tensor:
    """Return Phi(z), the standard normal distribution function, elementwise."""
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def interval_mass(mu: Tensor, sigma: Tensor, half_width: float | Tensor) -> Tensor:
    """Return P(|V| < half_width), where half_width is a number or a tensor of mu's shape."""
    return normal_cdf((mu + half_width) / sigma) - normal_cdf((mu - half_width) / sigma)


def triangle_mean(mu: Tensor, sigma: Tensor, g: float) -> Tensor:
    """Return E[max(0, g - |V|)] / g^2, in the type of mu.

    The triangle is a second difference of ramps max(0, v - knot). They are computed in float64, because they nearly
    cancel if sigma is much larger than g.
    """
    dtype = mu.dtype
    mu, sigma = mu.double(), sigma.double()

    def ramp(knot: float) -> Tensor:  # E[max(0, V - knot)]
        z = (mu - knot) / sigma
        return (mu - knot) * normal_cdf(z) + sigma * torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    return ((ramp(-g) - 2 * ramp(0.0) + ramp(g)) / g**2).to(dtype)


def mixture_mean(mu: Tensor, sigma: Tensor, mixture: Mixture, *, scale: float, height: float = 1.0) -> Tensor:
    """Return E[height f(V / scale)] for a scale mixture f.

    The mean of exp(-v^2 / 2 s^2) is a Gaussian in mu of variance s^2 + sigma^2.
    """
    scales, weights = mu.new_tensor(mixture)
    variance = sigma[..., None] ** 2 + (scale * scales) ** 2
    gaussians = torch.exp(-(mu[..., None] ** 2) / (2 * variance)) * variance.rsqrt()
    return gaussians @ (height * scale * weights * scales)


@cache
def logistic_mixture() -> Mixture:
    """Return the mixture of the logistic density y (1 - y) with y = sigmoid(v).

    Its s / 2 has Kolmogorov's distribution (Stefanski, Statistics & Probability Letters 11, 1991).
    """
    s, step = log_spaced(0.4, 7.0, 12)
    n = np.arange(1, 101)
    kolmogorov = 4 * s * ((-1.0) ** (n + 1) * n**2 * np.exp(-((n * s[:, None]) ** 2) / 2)).sum(1)
    return tuple(s), tuple(step * kolmogorov / (2 * math.sqrt(2 * math.pi)))


@cache
def laplace_mixture() -> Mixture:
    """Return the mixture of exp(-|v|).

    Its s^2 / 2 is exponentially distributed (Andrews & Mallows, Journal of the Royal Statistical Society B 36, 1974).
    """
    s, step = log_spaced(1e-5, 7.0, 36)
    return tuple(s), tuple(step * math.sqrt(2 / math.pi) * s * np.exp(-(s**2) / 2))


@cache
def superspike_mixture() -> Mixture:
    """Return the mixture of 1 / (1 + |v|)^2.

    This is a mixture over t of t e^-t exp(-t |v|), each of which is a mixture of Gaussians as in `laplace_mixture`.
    """
    s, step = log_spaced(2e-5, 300.0, 36)
    t, t_step = log_spaced(1e-6, 150.0, 600)
    inner = t_step * (t**3 * np.exp(-t - (t * s[:, None]) ** 2 / 2)).sum(1)
    return tuple(s), tuple(step * math.sqrt(2 / math.pi) * s * inner)


@cache
def cauchy_mixture() -> Mixture:
    """Return the mixture of 1 / (1 + v^2), whose 1 / (2 s^2) is exponentially distributed."""
    s, step = log_spaced(0.14, 200.0, 48)
    return tuple(s), tuple(step * np.exp(-1 / (2 * s**2)) / s**2)


def log_spaced(low: float, high: float, count: int) -> tuple[np.ndarray, float]:
    """Return `count` nodes of the trapezoid rule in ln s, from s = low to high, and their distance in ln s."""
    return np.geomspace(low, high, count), math.log(high / low) / (count - 1)
