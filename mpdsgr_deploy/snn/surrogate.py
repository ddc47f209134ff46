"""Surrogate gradients: what stands in for dO/dU of the spike O = [U >= V_th] on the backward pass.

Each is written once, as its derivative in v = U - V_th. `half_width` is half the window that MPD-SGR
empties: the support where it is finite, else the interval that holds 95 % of the derivative's mass. `expected` is the
derivative's mean over a Gaussian v.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpdsgr_deploy.snn.expectation import (
    Expectation,
    interval_mass,
    laplace_mixture,
    logistic_mixture,
    mixture_mean,
    superspike_mixture,
    triangle_mean,
)


class Surrogate(NamedTuple):
    """A named surrogate: `derivative` maps v of any shape to dO/dU of that shape, `expected` (mu, sigma) of any shape
    to the mean of `derivative` over N(mu, sigma^2); None where that is not known. `parameter` is the number in the
    formula of that name in `SURROGATES`, for those who write it again; None where it is no such formula.
    """

    name: str
    derivative: Callable[[Tensor], Tensor]
    half_width: float
    expected: Expectation | None = None
    parameter: float | None = None


def triangle(g: float = 1.0) -> Surrogate:
    """max(0, g - |v|) / g^2, support (-g, g) (Deng et al., arXiv 2202.11946)."""
    return Surrogate(
        "triangle", lambda v: (g - v.abs()).clamp(min=0) / g**2, g, lambda mu, sigma: triangle_mean(mu, sigma, g), g
    )


def rectangular(a: float = 1.0) -> Surrogate:
    """1[|v| < a/2] / a, support (-a/2, a/2) (STBP, Wu et al., arXiv 1706.02609)."""
    return Surrogate(
        "rectangular",
        lambda v: (v.abs() < a / 2).to(v.dtype) / a,
        a / 2,
        lambda mu, sigma: interval_mass(mu, sigma, a / 2) / a,
        a,
    )


def sigmoid(a: float = 4.0) -> Surrogate:
    """a s (1 - s) with s = sigmoid(a v); mass within h is tanh(a h / 2)."""

    def derivative(v: Tensor) -> Tensor:
        s = torch.sigmoid(a * v)
        return a * s * (1 - s)

    def expected(mu: Tensor, sigma: Tensor) -> Tensor:
        return mixture_mean(mu, sigma, logistic_mixture(), scale=1 / a, height=a)

    return Surrogate("sigmoid", derivative, 2 * math.atanh(0.95) / a, expected, a)


def superspike(k: float = 10.0) -> Surrogate:
    """1 / (1 + k |v|)^2 (Zenke & Ganguli, arXiv 1705.11146); share of the mass within h is 1 - 1 / (1 + k h)."""
    return Surrogate(
        "superspike",
        lambda v: (1 + k * v.abs()) ** -2,
        19 / k,
        lambda mu, sigma: mixture_mean(mu, sigma, superspike_mixture(), scale=1 / k),
        k,
    )


def exponential(a: float = 0.5) -> Surrogate:
    """exp(-|v| / a) / (2 a) (SLAYER, Shrestha & Orchard, arXiv 1810.08646); mass within h is 1 - exp(-h / a)."""
    return Surrogate(
        "exponential",
        lambda v: torch.exp(-v.abs() / a) / (2 * a),
        a * math.log(20),
        lambda mu, sigma: mixture_mean(mu, sigma, laplace_mixture(), scale=a, height=1 / (2 * a)),
        a,
    )


SURROGATES: dict[str, Callable[..., Surrogate]] = {
    "triangle": triangle,
    "rectangular": rectangular,
    "sigmoid": sigmoid,
    "superspike": superspike,
    "exponential": exponential,
}


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v_threshold: float, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(u)
        ctx.v_threshold, ctx.surrogate = v_threshold, surrogate
        return (u >= v_threshold).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.derivative(u - ctx.v_threshold), None, None


def spike(u: Tensor, v_threshold: float, surrogate: Surrogate) -> Tensor:
    """Heaviside(u - v_threshold) forward, `surrogate` backward; any shape, same dtype."""
    if not torch.is_grad_enabled():  # also what the ONNX exporter sees: GreaterOrEqual + Cast
        return (u >= v_threshold).to(u.dtype)
    return _Spike.apply(u, v_threshold, surrogate)
