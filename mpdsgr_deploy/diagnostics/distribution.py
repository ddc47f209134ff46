"""The distribution of membrane potentials of every layer, step and channel, measured over any number of batches.

Potentials are counted into bins during the forward pass and not kept. `observe_layers` measures a single pass.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mpdsgr_deploy.diagnostics.layer_statistics import LayerStatistics
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.mpd import SIGMA_FLOOR, Moments, empirical, overlap, per_channel, theorem
from mpdsgr_deploy.snn import Noise, Observer, TdBN, Trace

BINS = 240  # largest number of bins per layer
REACH = 5  # standard deviations around every channel's mean that the bins cover


class Distribution(NamedTuple):
    """One layer's membrane potentials U at T steps in C channels. All tensors are on the CPU.

    half_width: half the width of the surrogate's window around V_th. counts [T, C, bins]: number of potentials in
    [edges[i], edges[i + 1]); those beyond the outermost of the `edges` [bins + 1] are in no bin. size: number of
    potentials per step and channel, in bins or not. firing_rate, in_window [T, C]: shares of these potentials that
    cause a spike, and that have |U - V_th| below the half-width. empirical, theorem: measured moments, and those of
    Theorem 1, None for a layer that the theorem does not describe. scale: mean |lambda| of tdBN, None without tdBN.
    """

    layer: str
    v_threshold: float
    half_width: float
    edges: Tensor
    counts: Tensor
    size: int
    firing_rate: Tensor
    in_window: Tensor
    empirical: Moments
    theorem: Moments | None
    scale: float | None

    @property
    def window(self) -> tuple[float, float]:
        """The interval of potentials in which the surrogate passes a gradient."""
        return self.v_threshold - self.half_width, self.v_threshold + self.half_width

    def omega(self, moments: Moments) -> Tensor:
        """Return Omega [T, C] in [0, 1]: the probability of the window if potentials are Gaussian with `moments`."""
        return self.mass(moments, torch.tensor(self.window, dtype=torch.float64))[..., 0]

    def mass(self, moments: Moments, edges: Tensor) -> Tensor:
        """Return the probability [T, C, n] of the intervals between `edges` [n + 1] for Gaussian potentials."""
        mu, sigma = (moment.double()[..., None] for moment in moments)
        return torch.special.ndtr((edges.double() - self.v_threshold - mu) / sigma).diff()

    def statistics(self) -> LayerStatistics:
        """Return the layer's statistics, averaged over steps and channels."""
        return LayerStatistics(
            layer=self.layer,
            firing_rate=self.firing_rate.mean().item(),
            in_window=self.in_window.mean().item(),
            omega_theorem=None if self.theorem is None else self.omega(self.theorem).mean().item(),
            omega_empirical=self.omega(self.empirical).mean().item(),
            scale=self.scale,
            silent_channels=(self.firing_rate.sum(0) == 0).float().mean().item(),
        )


class LayerCounter:
    """Accumulates one layer's distribution over forward passes of the same network on any images.

    It keeps counts and sums over images, not the potentials. The moments of Theorem 1 are averaged over images as well,
    because their reset term is measured on each batch.
    """

    def __init__(self, first: Trace) -> None:
        self.layer, self.norm, self.neuron, states = first[:4]
        self.edges = bin_edges(empirical(first), self.neuron.v_threshold, self.neuron.surrogate.half_width)
        shape = len(states), states[0].u.shape[1], len(self.edges) - 1
        self.counts = torch.zeros(shape, dtype=torch.int64, device=self.edges.device)
        self.totals: list[Tensor] = []
        self.images = self.size = 0

    def add(self, trace: Trace) -> None:
        """Add the potentials of one forward pass."""
        u, _ = trace.states[0]
        half_width = self.neuron.surrogate.half_width
        in_window = [(state.u.float() - self.neuron.v_threshold).abs() < half_width for state in trace.states]
        mu, sigma = empirical(trace)
        means = [
            torch.stack([per_channel(state.spikes) for state in trace.states]),
            torch.stack([per_channel(inside) for inside in in_window]),
            mu,
            mu.double() ** 2 + sigma.double() ** 2,
            *(theorem(trace) or ()),
        ]
        sums = [len(u) * mean.double() for mean in means]
        self.totals = [a + b for a, b in zip(self.totals, sums, strict=True)] if self.totals else sums
        self.counts += torch.stack([histogram(state.u, self.edges) for state in trace.states])
        self.images += len(u)
        self.size += u.numel() // u.shape[1]

    def distribution(self) -> Distribution:
        """Return the distribution of all potentials that were added."""
        firing_rate, in_window, mu, square, *predicted = (total.cpu() / self.images for total in self.totals)
        sigma = (square - mu**2).clamp(min=SIGMA_FLOOR**2).sqrt()
        return Distribution(
            layer=self.layer,
            v_threshold=self.neuron.v_threshold,
            half_width=self.neuron.surrogate.half_width,
            edges=self.edges.cpu(),
            counts=self.counts.cpu(),
            size=self.size,
            firing_rate=firing_rate,
            in_window=in_window,
            empirical=Moments(mu, sigma),
            theorem=Moments(*predicted) if predicted else None,
            scale=self.norm.weight.abs().mean().item() if isinstance(self.norm, TdBN) else None,
        )


def bin_edges(moments: Moments, v_threshold: float, half_width: float) -> Tensor:
    """Return edges [bins + 1] of equal bins around the threshold; both borders of the surrogate's window are edges.

    The bins extend REACH standard deviations beyond every mean of `moments`, or as far as BINS bins of width half_width
    reach.
    """
    mu, sigma = moments
    # distance from the threshold to the outermost edges, in half-widths of the window
    reach = min(max(1, math.ceil((mu.abs() + REACH * sigma).max().item() / half_width)), BINS // 2)
    per_half_width = BINS // (2 * reach)
    steps = torch.arange(-reach * per_half_width, reach * per_half_width + 1, device=mu.device)
    return v_threshold + half_width * steps / per_half_width


def histogram(u: Tensor, edges: Tensor) -> Tensor:
    """Return the number of potentials u [B, C, ...] in [edges[i], edges[i + 1]): int64 [C, bins].

    Potentials beyond the outermost edges are not counted.
    """
    channels, buckets = u.shape[1], len(edges) + 1  # one more bucket below all bins and one above
    bucket = torch.bucketize(u.float().transpose(0, 1).flatten(1).contiguous(), edges, right=True)
    bucket += buckets * torch.arange(channels, device=u.device)[:, None]
    return torch.bincount(bucket.flatten(), minlength=channels * buckets).view(channels, buckets)[:, 1:-1]


@torch.no_grad()
def measure(model: SpikingNet, images: Tensor, *, batch_size: int, noise: Noise = None) -> list[Distribution]:
    """Measure every layer's distribution over images [N, C, H, W] in [0, 1], in the order of the forward pass.

    Images and model must be on the same device. noise: the random numbers of a stochastic network. The model stays in
    its mode: put it in eval mode to measure the network that will be deployed.
    """
    counters: dict[str, LayerCounter] = {}

    def observe(trace: Trace) -> None:
        if trace.layer not in counters:
            counters[trace.layer] = LayerCounter(trace)
        counters[trace.layer].add(trace)

    for batch in images.split(batch_size):
        model(batch, observe, noise)
    return [counter.distribution() for counter in counters.values()]


def layer_statistics(trace: Trace) -> LayerStatistics:
    """Return the statistics of a layer in one forward pass, averaged over steps and channels."""
    surrogate, v_threshold = trace.neuron.surrogate, trace.neuron.v_threshold
    predicted = theorem(trace)
    counted = [((u - v_threshold).abs() < surrogate.half_width).float().mean() for u, _ in trace.states]
    rates = torch.stack([per_channel(spikes) for _, spikes in trace.states])
    return LayerStatistics(
        layer=trace.layer,
        firing_rate=rates.mean().item(),
        in_window=torch.stack(counted).mean().item(),
        omega_theorem=None if predicted is None else overlap(predicted, surrogate).mean().item(),
        omega_empirical=overlap(empirical(trace), surrogate).mean().item(),
        scale=trace.norm.weight.abs().mean().item() if isinstance(trace.norm, TdBN) else None,
        silent_channels=(rates.sum(0) == 0).float().mean().item(),
    )


def observe_layers(into: list[LayerStatistics]) -> Observer:
    """Make an observer that appends each layer's statistics to `into`."""
    return lambda trace: into.append(layer_statistics(trace))
