"""The distribution of membrane potentials, and its overlap with the surrogate's window (MPD-SGR, arXiv 2511.12199).

Theorem 1: a LIF neuron in channel c whose input current comes from tdBN has at step t = 1..T the potential

    U_c(t) ~ N( beta_c D(tau, t) - S_c(t),  (lambda_c alpha V_th)^2 D(tau^2, t) ),   D(a, t) = sum_{i=1..t} a^(t-i)

S is the mean of what resets have removed: S(1) = 0, S(t) = tau (S(t-1) + R(t-1)), where R is V_th E[O] for a soft reset
and E[U O] for a hard reset. The surrogate is a function of V = U - V_th, with mean mu = E[U] - V_th and the deviation
sigma of U. With the surrogate's half-width g,

    Omega = Phi((mu + g) / sigma) - Phi((mu - g) / sigma)

is the share of the neuron's potentials inside the window. The training loss is CE + eta * mean Omega. Moments are
tensors [T, C]. All computations are in float32, also under mixed precision.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.snn import Surrogate, TdBN, Trace
from mpdsgr_deploy.snn.expected_surrogate import interval_mass

SIGMA_FLOOR = 1e-6


class Moments(NamedTuple):
    """Mean and standard deviation [T, C] of V = U - V_th."""

    mu: Tensor
    sigma: Tensor


def leak_sum(a: float, T: int) -> Tensor:
    """Return D(a, t) = sum_{i=1..t} a^(t-i) for t = 1..T: [T]."""
    return torch.tensor([sum(a**k for k in range(t)) for t in range(1, T + 1)])


def per_channel(x: Tensor) -> Tensor:
    """Return the mean over batch and space: [B, C, ...] to [C]."""
    return x.float().mean([0, *range(2, x.dim())])


def reset_shift(trace: Trace) -> Tensor:
    """Return S [T, C], measured on the batch of a trace and detached, so that no gradient passes through it."""
    neuron, u = trace.neuron, trace.states[0].u
    shift = torch.zeros(u.shape[1], device=u.device)
    shifts = [shift]
    for t, (u, spikes) in enumerate(trace.states[:-1]):
        if trace.moments is not None:
            removed = trace.moments.removed[t]
        else:
            reset = u.detach() * spikes.detach() if neuron.reset == "hard" else neuron.v_threshold * spikes.detach()
            removed = per_channel(reset)
        shift = neuron.tau * (shift + removed)
        shifts.append(shift)
    return torch.stack(shifts)


def theorem(trace: Trace) -> Moments | None:
    """Return the moments of Theorem 1 for a layer. Their gradient reaches only lambda and beta.

    None for a layer without tdBN, or whose neurons change over time, because the theorem does not describe it.
    """
    if not isinstance(trace.norm, TdBN) or not trace.neuron.time_invariant:
        return None
    tau, T = trace.neuron.tau, len(trace.states)
    scale, beta = trace.norm.scale.float(), trace.norm.bias.float()
    mean = leak_sum(tau, T).to(beta.device)[:, None] * beta - reset_shift(trace)
    deviation = leak_sum(tau**2, T).to(beta.device).sqrt()[:, None] * scale.abs()
    return Moments(mean - trace.neuron.v_threshold, deviation + SIGMA_FLOOR)


class _BatchMoments(torch.autograd.Function):
    """The mean and the variance [T, C] of T tensors u [B, C, ...].

    The statistics kernel of batch normalisation reads u once, and the hand-written gradient takes one pass over u,
    where autograd takes five.
    """

    @staticmethod
    def forward(ctx: Any, *steps: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(steps[0].dtype, torch.float32)
        # running statistics that the kernel needs, whose type is that of its sums and results
        unread = steps[0].new_zeros(steps[0].shape[1], dtype=dtype)
        moments = [torch.batch_norm_update_stats(u, unread, unread, 0.0) for u in steps]
        mean, variance = (torch.stack(moment) for moment in zip(*moments, strict=True))
        ctx.save_for_backward(mean, *steps)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        mean, *steps = ctx.saved_tensors
        count = steps[0].numel() // steps[0].shape[1]
        slope = grads[1] * (2 / count)
        constant = grads[0] / count - slope * mean
        shape = (len(steps), 1, -1, *[1] * (steps[0].dim() - 2))
        slopes, constants = (g.to(steps[0].dtype).view(shape) for g in (slope, constant))
        return tuple(torch.addcmul(c, u, s) for c, u, s in zip(constants, steps, slopes, strict=True))


def empirical(trace: Trace) -> Moments:
    """Return the moments of the batch by step and channel. Their gradient reaches all weights before the layer."""
    if trace.moments is not None:
        mean, variance, _ = trace.moments
    else:
        mean, variance = _BatchMoments.apply(*[u for u, _ in trace.states])
    # clamped, because the standard deviation of a constant channel has no gradient
    return Moments(mean - trace.neuron.v_threshold, variance.clamp(min=SIGMA_FLOOR**2).sqrt())


Estimator = Callable[[Trace], Moments | None]
ESTIMATORS: dict[str, Estimator] = {"theorem": theorem, "empirical": empirical}


def overlap(moments: Moments, surrogate: Surrogate) -> Tensor:
    """Return Omega [T, C] in [0, 1]: the probability that |V| is below the surrogate's half-width."""
    return interval_mass(*moments, surrogate.half_width)


def expected_gradient(moments: Moments, surrogate: Surrogate) -> Tensor:
    """Return E[surrogate'(V)] / surrogate'(0) [T, C] in [0, 1]: the mean surrogate gradient as a share of its peak.

    The overlap approximates it by a window of height one. Because of the division by the peak, eta means the same for
    both: for the rectangular surrogate they are equal (E[surrogate'] is Omega / a, and its peak 1 / a). If the Gaussian
    is much wider than the window, the ratio to Omega is 1/2 for the triangle, 0.55 for the sigmoid, and 0.05 for
    superspike, since most of the window that holds 95 % of its mass is tail. Raises InputError for a surrogate without
    `expected`.
    """
    if surrogate.expected is None:
        raise InputError(f"the mean gradient of surrogate {surrogate.name!r} is not known; set measure = 'overlap'")
    mu, sigma = moments
    return surrogate.expected(mu, sigma) / surrogate.derivative(mu.new_zeros(()))


Measure = Callable[[Moments, Surrogate], Tensor]
MEASURES: dict[str, Measure] = {"overlap": overlap, "expected-gradient": expected_gradient}


def layer_value(trace: Trace, estimator: Estimator, measure: Measure) -> Tensor | None:
    """Return the mean of a measure over a layer's steps and channels; None if the estimator returns None."""
    with unrounded(trace):
        moments = estimator(trace)
        return None if moments is None else measure(moments, trace.neuron.surrogate).mean()


def layer_moments(trace: Trace, estimator: Estimator) -> Moments | None:
    """Return an estimator's moments of a layer, in float32; None if it does not describe the layer."""
    with unrounded(trace):
        return estimator(trace)


def unrounded(trace: Trace) -> torch.autocast:
    """Return a context manager that turns autocast off on the device of a layer's tensors."""
    u = trace.states[0].u
    return torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False)  # autocast cannot take the meta device


def reach(potentials: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the root mean square distance [T, C], over images and space, between potentials of two sets of images.

    potentials, others: T tensors [B, C, ...] each. If a window has this half-width, the overlap estimates the share of
    spikes that differ between the two sets, given that potentials are Gaussian and independent of their change. The
    distance grows with the weights as sigma does, so larger weights do not reduce this overlap, as they reduce that
    with a window of fixed width. The result is float32.
    """
    squares = [(u.float() - v.float()).square() for u, v in zip(potentials, others, strict=True)]
    return (torch.stack([per_channel(square) for square in squares]) + SIGMA_FLOOR**2).sqrt()


def mean_of_layers(values: Sequence[Tensor | None]) -> Tensor:
    """Return the mean over the values of layers, each with the same weight, a differentiable float32 scalar.

    None stands for a layer that the estimator does not describe. Raises InputError if all are None.
    """
    layers = [value for value in values if value is not None]
    if not layers:
        raise InputError(
            "the theorem estimator needs layers with tdBN whose neurons do not change over time and this model has "
            "none; set defence.mpd-sgr.estimator = 'empirical'"
        )
    return torch.stack(layers).mean()
