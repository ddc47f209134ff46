"""Membrane potential distribution and its overlap with the surrogate's window (MPD-SGR, arXiv 2511.12199).

Theorem 1: where tdBN feeds a LIF neuron, its membrane potential in channel c at step t = 1..T is

    U_c(t) ~ N( beta_c D(tau, t) - S_c(t),  (lambda_c alpha V_th)^2 D(tau^2, t) ),   D(a, t) = sum_{i=1..t} a^(t-i)

S collects what resets took away: S(1) = 0, S(t) = tau (S(t-1) + R(t-1)), with R = V_th E[O] (soft reset) or E[U O]
(hard reset). The surrogate looks at V = U - V_th, so its mean here is E[U] - V_th, and

    Omega = Phi((mu + g) / sigma) - Phi((mu - g) / sigma)     with the surrogate's half-width g

is the share of the neuron's potentials inside the window. The training loss is CE + eta * mean Omega.
Moments are tensors [T, C]; everything is float32 also under mixed precision.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpdsgr_deploy.diagnostics.statistics import LayerStatistics as LayerStatistics
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.snn import Observer, TdBN, Trace

SIGMA_FLOOR = 1e-6


class Moments(NamedTuple):
    """Mean and standard deviation [T, C] of V = U - V_th."""

    mu: Tensor
    sigma: Tensor


def leak_sum(a: float, T: int) -> Tensor:
    """D(a, t) = sum_{i=1..t} a^(t-i) for t = 1..T: [T]."""
    return torch.tensor([sum(a**k for k in range(t)) for t in range(1, T + 1)])


def per_channel(x: Tensor) -> Tensor:
    """Mean over batch and space: [B, C, ...] to [C]."""
    return x.float().mean([0, *range(2, x.dim())])


def reset_shift(trace: Trace) -> Tensor:
    """S [T, C], measured on the batch. Detached: a reading of the state, not a path for the gradient."""
    neuron = trace.neuron
    shift = torch.zeros_like(per_channel(trace.states[0].u))
    shifts = [shift]
    for u, spikes in trace.states[:-1]:
        removed = u.detach() * spikes.detach() if neuron.reset == "hard" else neuron.v_threshold * spikes.detach()
        shift = neuron.tau * (shift + per_channel(removed))
        shifts.append(shift)
    return torch.stack(shifts)


def theorem(trace: Trace) -> Moments | None:
    """Theorem 1: the gradient reaches lambda and beta only. None for a layer it does not speak of: one without tdBN,
    or whose neurons change over time.
    """
    if not isinstance(trace.norm, TdBN) or not trace.neuron.time_invariant:
        return None
    tau, T = trace.neuron.tau, len(trace.states)
    scale, beta = trace.norm.scale.float(), trace.norm.bias.float()
    mean = leak_sum(tau, T).to(beta.device)[:, None] * beta - reset_shift(trace)
    deviation = leak_sum(tau**2, T).to(beta.device).sqrt()[:, None] * scale.abs()
    return Moments(mean - trace.neuron.v_threshold, deviation + SIGMA_FLOOR)


class _MeanAndSquare(torch.autograd.Function):
    """E[u], E[u^2] per channel. By hand, because its gradient is one pass over u; autograd's own takes five."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u)
        return per_channel(u), per_channel(u.float().square())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        shape = (1, -1, *[1] * (u.dim() - 2))
        count = u.numel() // u.shape[1]
        constant, slope = (g.div(count).to(u.dtype).view(shape) for g in (grads[0], 2 * grads[1]))
        return torch.addcmul(constant, u, slope)


def empirical(trace: Trace) -> Moments:
    """Batch moments per channel and step: the gradient reaches every weight."""
    steps = [_MeanAndSquare.apply(u) for u, _ in trace.states]
    mean, square = (torch.stack(moment) for moment in zip(*steps, strict=True))
    # clamped: a channel that never varies has no direction for its standard deviation
    sigma = (square - mean**2).clamp(min=SIGMA_FLOOR**2).sqrt()
    return Moments(mean - trace.neuron.v_threshold, sigma)


ESTIMATORS: dict[str, Callable[[Trace], Moments | None]] = {"theorem": theorem, "empirical": empirical}


def normal_cdf(z: Tensor) -> Tensor:
    """Phi(z), elementwise."""
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def overlap(moments: Moments, half_width: float) -> Tensor:
    """Omega [T, C] in [0, 1]: the probability mass within half_width of the threshold."""
    mu, sigma = moments
    return normal_cdf((mu + half_width) / sigma) - normal_cdf((mu - half_width) / sigma)


def mean_overlap(traces: Sequence[Trace], estimator: Callable[[Trace], Moments | None]) -> Tensor:
    """Mean Omega over the layers of a forward pass, a differentiable float32 scalar.

    Each layer weighs the same, whatever its number of channels; the readout has no neurons and is not seen. Raises
    InputError if the estimator speaks of none of the layers.
    """
    layers = []
    for trace in traces:
        with torch.autocast(trace.states[0].u.device.type, enabled=False):
            moments = estimator(trace)
            if moments is not None:
                layers.append(overlap(moments, trace.neuron.surrogate.half_width).mean())
    if not layers:
        raise InputError(
            "the theorem estimator needs layers with tdBN whose neurons do not change over time and this model has "
            "none; set defence.mpd-sgr.estimator = 'empirical'"
        )
    return torch.stack(layers).mean()


def layer_statistics(trace: Trace) -> LayerStatistics:
    """Count and estimate on one forward pass."""
    half_width, v_threshold = trace.neuron.surrogate.half_width, trace.neuron.v_threshold
    predicted = theorem(trace)
    counted = [((u - v_threshold).abs() < half_width).float().mean() for u, _ in trace.states]
    rates = torch.stack([per_channel(spikes) for _, spikes in trace.states])
    return LayerStatistics(
        layer=trace.layer,
        firing_rate=rates.mean().item(),
        in_window=torch.stack(counted).mean().item(),
        omega_theorem=None if predicted is None else overlap(predicted, half_width).mean().item(),
        omega_empirical=overlap(empirical(trace), half_width).mean().item(),
        scale=trace.norm.weight.abs().mean().item() if isinstance(trace.norm, TdBN) else None,
        silent_channels=(rates.sum(0) == 0).float().mean().item(),
    )


def observe_layers(into: list[LayerStatistics]) -> Observer:
    """An observer that appends each layer's statistics to `into`."""
    return lambda trace: into.append(layer_statistics(trace))
