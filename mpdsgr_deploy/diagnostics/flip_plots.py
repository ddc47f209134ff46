"""Plot where reduced precisions flip spikes of the float32 network. Torch is not needed.

Lines differ in markers as well as in colour.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.claimed_directories import claim_directory
from mpdsgr_deploy.diagnostics.picture import BLUE, GREEN, PURPLE, VERMILION, plain, png
from mpdsgr_deploy.diagnostics.spike_flips import SpikeFlips

BY_LAYER, BY_DENSITY = "flips.png", "density.png"
COLOURS, MARKERS, FRESH = (BLUE, VERMILION, GREEN, PURPLE), "osD^", "black"
ENTRY = 2.3  # inches that an entry of the legend takes
SMALLEST = 0.6  # a logarithmic axis begins at this share of the smallest rate


def plot_flips(variants: Sequence[SpikeFlips], out: Path) -> None:
    """Write flips.png and density.png. Raises InputError for a directory `out` that holds other files."""
    claim_directory(out, BY_LAYER, "set of plots of flips")
    write_atomic(out / BY_DENSITY, png(by_density(variants)))
    write_atomic(out / BY_LAYER, png(by_layer(variants)))


def by_layer(variants: Sequence[SpikeFlips]) -> Figure:
    """Plot the share of flipped spikes by layer: a panel per precision, a line per time step.

    The dashed line shows the flips by each layer's own rounding, averaged over steps. All variants must have the same
    layers and steps.
    """
    layers = variants[0].layers()
    T = len(variants[0].steps) // len(layers)
    width = max(ENTRY * 2, 1.5 + len(variants) * max(3.2, 0.55 * len(layers)))
    columns = int(width / ENTRY)  # columns of the legend, whose longest entry is the last
    figure = Figure(figsize=(width, 4.0 + 0.2 * math.ceil((T + 1) / columns)), layout="constrained")
    panels = figure.subplots(1, len(variants), sharey=True, squeeze=False)[0]
    places, shades = np.arange(len(layers)), colormaps["viridis_r"](np.linspace(0.2, 1, T))
    for axes, flips in zip(panels, variants, strict=True):
        rates = 100 * np.array([step.rate for step in flips.steps]).reshape(len(layers), T)
        for t in range(T):
            axes.plot(places, rates[:, t], "o-", color=shades[t], markersize=3, label=f"all flips, t = {t + 1}")
        own_rounding = [100 * flips.mean("fresh", layer) for layer in layers]
        axes.plot(places, own_rounding, "x--", color=FRESH, label="own rounding, all steps")
        axes.set_title(f"{flips.precision}: {flips.labels_changed} of {flips.n} labels changed")
        axes.set_xticks(places, layers, rotation=45 if len(layers) > 6 else 0)
        axes.set(xlabel="layer", yscale="symlog")
        axes.spines[["top", "right"]].set_visible(False)
    positive = [100 * rate for flips in variants for s in flips.steps for rate in (s.rate, s.fresh) if rate > 0]
    for axes in panels:  # linear below the smallest rate, so that zero can be drawn
        axes.set_yscale("symlog", linthresh=min(positive, default=1))
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("spikes that differ from fp32 (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def by_density(variants: Sequence[SpikeFlips]) -> Figure:
    """Plot flips by a layer's own rounding against the density of potentials at the threshold.

    The right panel has density times mean |difference| of potentials on its axis; points lie on its line if the
    prediction of `spike_flips` holds. Each point is a layer at a step.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rates = []
    for flips, colour, marker in zip(variants, COLOURS, MARKERS, strict=False):
        steps = [step for step in flips.steps if step.fresh > 0]  # zero cannot be drawn on a logarithmic axis
        rates += [step.fresh for step in steps]
        density, movement, fresh = (
            np.array([getattr(step, name) for step in steps]) for name in ("density", "fresh_moved", "fresh")
        )
        for axes, x in ((left, density), (right, density * movement)):
            axes.plot(x, fresh, marker, color=colour, markersize=5, alpha=0.7, label=flips.precision)
    left.xaxis.set_major_locator(MaxNLocator(5))
    if rates:
        ends = SMALLEST * min(rates), max(rates) / SMALLEST
        right.plot(ends, ends, color="black", linewidth=0.8, label="equal")
        right.set(xscale="log", yscale="log")
        for axis in (right.xaxis, right.yaxis):
            _label_decades(axis)
    left.set(xlabel="density of fp32 potentials at the threshold", ylabel="flips by a layer's own rounding (share)")
    right.set(xlabel="density × mean |difference| of potentials")
    for axes in (left, right):
        plain(axes)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    return figure


def _label_decades(axis: Axis) -> None:
    """Label powers of ten, and on an axis shorter than two decades also 2 and 5 times these."""
    low, high = axis.get_view_interval()
    narrow = high < 100 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
    axis.set_minor_formatter(NullFormatter())
