"""Statistics of a torch network's layers while it runs."""

import torch

from mpdsgr_deploy.diagnostics.layer_statistics import LayerStatistics
from mpdsgr_deploy.mpd import empirical, overlap, per_channel, theorem
from mpdsgr_deploy.snn import Observer, TdBN, Trace


def layer_statistics(trace: Trace) -> LayerStatistics:
    """Return a layer's statistics, counted and estimated, over one forward pass."""
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
