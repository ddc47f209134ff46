"""Surrogate gradients in torch: a kind of `mpdsgr_deploy.surrogates` with its width, and the spike that it serves."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpdsgr_deploy.snn.expected_surrogate import (
    Expectation,
    cauchy_mixture,
    interval_mass,
    laplace_mixture,
    logistic_mixture,
    mixture_mean,
    superspike_mixture,
    triangle_mean,
)
from mpdsgr_deploy.surrogates import KINDS, STRAIGHT, parse_surrogate


class Surrogate(NamedTuple):
    """A surrogate of some width.

    derivative maps v = U - V_th of any shape to dO/dU of that shape; half_width is as of `SurrogateKind`. expected maps
    (mu, sigma) of any shape to the mean of `derivative` over N(mu, sigma^2); None where that is not known. parameter is
    the width, for those who write the formula of that kind again; None where `name` is not a kind.
    """

    name: str
    derivative: Callable[[Tensor], Tensor]
    half_width: float
    expected: Expectation | None = None
    parameter: float | None = None


@lru_cache(maxsize=256)  # cached, so that networks with the same surrogate share its compiled functions
def make_surrogate(name: str, width: float | None = None) -> Surrogate:
    """The surrogate "KIND" or "KIND:WIDTH", or a kind with the width given beside it.

    Raises InputError for an unknown name or width, and for the attackers' surrogates that are not a function of v.
    """
    kind, named, *_ = parse_surrogate(name)
    if kind == STRAIGHT:
        return Surrogate(kind, torch.ones_like, math.inf)
    family, w = KINDS.choose(kind), named if width is None else width
    expected = partial(EXPECTED[kind], w=w) if kind in EXPECTED else None
    return Surrogate(kind, lambda v: family.derivative(v, w), family.half_width(w), expected, w)


def _triangle(mu: Tensor, sigma: Tensor, w: float) -> Tensor:
    return triangle_mean(mu, sigma, w)


def _rectangular(mu: Tensor, sigma: Tensor, w: float) -> Tensor:
    return interval_mass(mu, sigma, w / 2) / w


def _sigmoid(mu: Tensor, sigma: Tensor, w: float) -> Tensor:
    return mixture_mean(mu, sigma, logistic_mixture(), scale=1 / w, height=w)


def _superspike(mu: Tensor, sigma: Tensor, w: float) -> Tensor:
    return mixture_mean(mu, sigma, superspike_mixture(), scale=1 / w)


def _exponential(mu: Tensor, sigma: Tensor, w: float) -> Tensor:
    return mixture_mean(mu, sigma, laplace_mixture(), scale=w, height=1 / (2 * w))


def _arctan(mu: Tensor, sigma: Tensor, w: float) -> Tensor:
    return mixture_mean(mu, sigma, cauchy_mixture(), scale=2 / (math.pi * w), height=w / 2)


# The mean of a kind's derivative over N(mu, sigma^2), for those whose mean is known
EXPECTED: dict[str, Callable[..., Tensor]] = {
    "triangle": _triangle,
    "rectangular": _rectangular,
    "sigmoid": _sigmoid,
    "superspike": _superspike,
    "exponential": _exponential,
    "arctan": _arctan,
}


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v_threshold: float, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(u)
        ctx.v_threshold, ctx.surrogate = v_threshold, surrogate
        return _fired(u, v_threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.derivative(u - ctx.v_threshold), None, None


def spike(u: Tensor, v_threshold: float, surrogate: Surrogate) -> Tensor:
    """Heaviside(u - v_threshold) forward, `surrogate` backward; any shape, same dtype."""
    return _Spike.apply(u, v_threshold, surrogate) if torch.is_grad_enabled() else _fired(u, v_threshold)


def _fired(u: Tensor, v_threshold: float) -> Tensor:
    """Spikes, compared in u's own type: on a CPU booleans on the way would take most of a neuron's time.

    A compiler fuses them, and the ONNX exporter is to see GreaterOrEqual and Cast.
    """
    if torch.compiler.is_compiling():
        return (u >= v_threshold).to(u.dtype)
    return torch.ge(u, v_threshold, out=torch.empty_like(u))
