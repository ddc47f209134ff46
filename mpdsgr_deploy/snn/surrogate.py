"""Surrogate gradients in torch: the kinds of `mpdsgr_deploy.surrogates` with a width, and the spike function."""

import math
from collections.abc import Callable
from functools import lru_cache
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
    """A surrogate with its width.

    derivative: maps v = U - V_th of any shape to dO/dU of this shape. half_width: see `SurrogateKind`. expected: maps
    mu and sigma of any shape to the mean of `derivative` over N(mu, sigma^2); None if no formula is known. parameter:
    the width, for code that implements the formula of a kind itself; None if `name` is not a kind.
    """

    name: str
    derivative: Callable[[Tensor], Tensor]
    half_width: float
    expected: Expectation | None = None
    parameter: float | None = None


@lru_cache(maxsize=256)  # cached, so that networks with the same surrogate share compiled functions
def make_surrogate(name: str, width: float | None = None) -> Surrogate:
    """Return the surrogate "KIND" or "KIND:WIDTH"; `width` overrides the width in the name.

    Raises InputError for an unknown name or an invalid width, and for surrogates of attackers that are not a function
    of v alone.
    """
    kind, named_width, *_ = parse_surrogate(name)
    if kind == STRAIGHT:
        return Surrogate(kind, torch.ones_like, math.inf)
    family, w = KINDS.choose(kind), named_width if width is None else width
    mean = EXPECTED.get(kind)
    expected = None if mean is None else lambda mu, sigma: mean(mu, sigma, w)
    return Surrogate(kind, lambda v: family.derivative(v, w), family.half_width(w), expected, w)


# The mean of a kind's derivative over N(mu, sigma^2), for kinds whose mean is known
EXPECTED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "triangle": triangle_mean,
    "rectangular": lambda mu, sigma, w: interval_mass(mu, sigma, w / 2) / w,
    "sigmoid": lambda mu, sigma, w: mixture_mean(mu, sigma, logistic_mixture(), scale=1 / w, height=w),
    "superspike": lambda mu, sigma, w: mixture_mean(mu, sigma, superspike_mixture(), scale=1 / w),
    "exponential": lambda mu, sigma, w: mixture_mean(mu, sigma, laplace_mixture(), scale=w, height=1 / (2 * w)),
    "arctan": lambda mu, sigma, w: mixture_mean(mu, sigma, cauchy_mixture(), scale=2 / (math.pi * w), height=w / 2),
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
    """Return spikes [u >= v_threshold] in the shape and dtype of u, with the gradient of `surrogate`."""
    return _Spike.apply(u, v_threshold, surrogate) if torch.is_grad_enabled() else _fired(u, v_threshold)


def _fired(u: Tensor, v_threshold: float) -> Tensor:
    """Return spikes, compared in u's type, because on a CPU intermediate booleans take most of a neuron's time.

    Booleans are used if torch compiles, which fuses them, or exports: the ONNX graph then has GreaterOrEqual and Cast.
    """
    if torch.compiler.is_compiling():
        return (u >= v_threshold).to(u.dtype)
    return torch.ge(u, v_threshold, out=torch.empty_like(u))
