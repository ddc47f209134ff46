"""Plot measured distributions of membrane potentials: all layers together, and the steps and channels of one layer.

Lines that share a plot differ in dashes or markers as well as in colour.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from numpy.typing import NDArray
from torch import Tensor

from mpdsgr_deploy.diagnostics.distribution import Distribution
from mpdsgr_deploy.diagnostics.layer_statistics import INFLATED_SCALE, SATURATED_RATE, SILENT_RATE, LayerStatistics
from mpdsgr_deploy.diagnostics.picture import BLUE, LIGHT_GREY, MIDDLE_GREY, VERMILION, YELLOW
from mpdsgr_deploy.mpd import Moments

COLUMNS = 4  # largest number of panels in a row
WIDTH, MAP, PANEL = 13.0, 2.4, 1.6  # in inches: width of a page, height of a heat map and of a panel
ABOVE, BETWEEN, BELOW = 0.8, 0.55, 0.8  # inches around panels, for their titles, their axis and the legend
COUNTED, IN_WINDOW, THEOREM, EMPIRICAL, WINDOW = LIGHT_GREY, MIDDLE_GREY, VERMILION, BLUE, YELLOW
TAIL = 5e-4  # largest share of the potentials that lies beyond each end of the horizontal axis


def overview(layers: list[LayerStatistics]) -> Figure:
    """Plot the firing rate, the share of potentials in the window with both Omegas, and mean |lambda| of each layer."""
    figure = Figure(figsize=(max(6, min(WIDTH, 2 + 0.8 * len(layers))), 7), layout="constrained")
    rate, window, scale = figure.subplots(3, sharex=True)
    places = np.arange(len(layers))

    def values(name: str) -> NDArray[np.float64]:
        return np.array([getattr(layer, name) for layer in layers], float)  # None becomes NaN, which is not drawn

    rate.bar(places, values("firing_rate"), 0.6, color=COUNTED, label="firing rate")
    rate.plot(places, values("silent_channels"), "kv", label="channels that never fire", clip_on=False)
    rate.axhline(SILENT_RATE, color="black", linewidth=0.8, linestyle=":", label="silent, saturated")
    rate.axhline(SATURATED_RATE, color="black", linewidth=0.8, linestyle=":")
    rate.set(ylabel="spikes per step; share", ylim=(0, 1))
    window.bar(places, values("in_window"), 0.6, color=COUNTED, label="counted")
    window.plot(places, values("omega_theorem"), "o", color=THEOREM, label="Ω by Theorem 1")
    window.plot(places, values("omega_empirical"), "x", color=EMPIRICAL, markersize=9, label="Ω by empirical moments")
    window.set(ylabel="share of U in window", ylim=(0, 1))
    scale.bar(places, values("scale"), 0.6, color=COUNTED, label="mean |λ|")
    scale.axhline(1, color="black", linewidth=0.8, label="at the start")
    scale.axhline(INFLATED_SCALE, color="black", linewidth=0.8, linestyle=":", label="inflated")
    scale.set(ylabel="mean |λ| of tdBN", xlabel="layer")
    scale.set_xticks(places, [layer.layer for layer in layers])
    for axes in (rate, window, scale):
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def layer_steps(layer: Distribution, channel: int | None = None) -> Figure:
    """Plot the potentials step by step: those of one channel, or of all channels together."""
    figure = Figure(figsize=(WIDTH, height(layer)))
    draw_steps(figure, layer, channel)
    which = f"all {layer.counts.shape[1]} channels" if channel is None else f"channel {channel}"
    figure.suptitle(f"{layer.layer}: membrane potentials, {which}")
    return figure


def layer_channels(layer: Distribution) -> Figure:
    """Plot the share of potentials in the window by channel and step, and two channels' potentials step by step.

    The two channels are those with the largest and the smallest mean share.
    """
    share = layer.in_window.numpy()
    order = np.argsort(-share.mean(0), kind="stable")
    heights = (MAP, height(layer), height(layer))
    figure = Figure(figsize=(WIDTH, sum(heights)))
    top, *others = figure.subfigures(3, height_ratios=heights, squeeze=False).flat
    axes = top.subplots(gridspec_kw={"left": 0.05, "right": 1.06, "top": 0.85, "bottom": 0.2})
    image = axes.imshow(share[:, order], aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    axes.set(xlabel="rank of the channel by its mean share", ylabel="time step t")
    axes.set_yticks(range(len(share)), range(1, len(share) + 1))
    top.colorbar(image, label="counted share in window", pad=0.02)
    top.suptitle(f"{layer.layer}: share of potentials in the surrogate's window, by channel and step")
    for part, channel, which in zip(others, (order[0], order[-1]), ("largest", "smallest"), strict=True):
        draw_steps(part, layer, int(channel))
        part.suptitle(f"{layer.layer}, channel {channel}: the {which} share in the window")
    return figure


def rows(layer: Distribution) -> int:
    """Return the number of rows in which the panels of all steps stand."""
    return math.ceil(len(layer.counts) / COLUMNS)


def height(layer: Distribution) -> float:
    """Return the height in inches of the panels of all steps, including the text above and below them."""
    return ABOVE + BELOW + rows(layer) * PANEL + (rows(layer) - 1) * BETWEEN


def draw_steps(figure: FigureBase, layer: Distribution, channel: int | None) -> None:
    """Draw one panel per step: the histogram, the Gaussians of both estimates, and the surrogate's window.

    channel: index of the channel to draw; None draws the mean over all channels.
    """
    channels = slice(None) if channel is None else slice(channel, channel + 1)

    def mean(values: Tensor) -> NDArray[np.float64]:
        """Return the mean over the channels that are drawn: [T, C, ...] to [T, ...]."""
        return values[:, channels].double().mean(1).numpy()

    estimates: list[tuple[str, str, str, Moments]] = [("empirical", EMPIRICAL, "--", layer.empirical)]
    if layer.theorem is not None:
        estimates.insert(0, ("theorem", THEOREM, "-", layer.theorem))
    edges = layer.edges.numpy()
    widths, centres = np.diff(edges), (edges[:-1] + edges[1:]) / 2
    inside = abs(centres - layer.v_threshold) < layer.half_width
    density = mean(layer.counts) / layer.size / widths
    curves = [mean(layer.mass(moments, layer.edges)) / widths for *_, moments in estimates]
    omegas = [mean(layer.omega(moments)) for *_, moments in estimates]
    window, rate = mean(layer.in_window), mean(layer.firing_rate)
    for t, axes in enumerate(panels(figure, layer)):
        axes.axvspan(*layer.window, color=WINDOW, alpha=0.35, linewidth=0, label="surrogate's window")
        axes.axvline(layer.v_threshold, color="black", linewidth=0.8, linestyle=":", label="threshold")
        axes.stairs(density[t], edges, fill=True, color=COUNTED, label="counted")
        axes.stairs(density[t] * inside, edges, fill=True, color=IN_WINDOW, label="counted in the window")
        for (name, colour, line, _), curve in zip(estimates, curves, strict=True):
            axes.plot(centres, curve[t], line, color=colour, label=f"Gaussians, {name} moments")
        estimated = ", ".join(f"{name} {omega[t]:.2f}" for (name, *_), omega in zip(estimates, omegas, strict=True))
        title = f"t = {t + 1}, firing rate {rate[t]:.2f}\nΩ: {estimated}, counted {window[t]:.2f}"
        axes.set_title(title, fontsize=9)
    axes.set(xlim=visible(layer, channels), ylim=(0, None))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)


def panels(figure: FigureBase, layer: Distribution) -> list[Axes]:
    """Return T labelled axes that share their scales. They have fixed places: a layout engine doubles the run time."""
    steps, total = len(layer.counts), height(layer)
    columns = math.ceil(steps / rows(layer))
    places = {
        "left": 0.05,
        "right": 0.99,
        "top": 1 - ABOVE / total,
        "bottom": BELOW / total,
        "wspace": 0.05,
        "hspace": BETWEEN / PANEL,
    }
    grid = figure.subplots(rows(layer), columns, sharex=True, sharey=True, squeeze=False, gridspec_kw=places)
    used: list[Axes] = list(grid.flat)[:steps]
    for axes in grid.flat:
        axes.set_visible(axes in used)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in used[-columns:]:  # the lowest of each column, also where the last row is not full
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("membrane potential U")
    for axes in grid[:, 0]:
        axes.set_ylabel("density")
    return used


def visible(layer: Distribution, channels: slice) -> tuple[float, float]:
    """Return the ends of the horizontal axis, which shows the window and all but TAIL of the potentials at each end."""
    edges = layer.edges.numpy()
    cumulative = layer.counts[:, channels].sum((0, 1)).numpy().cumsum()
    first, last = np.searchsorted(cumulative, [TAIL * cumulative[-1], (1 - TAIL) * cumulative[-1]])
    margin = 0.2 * layer.half_width
    low, high = layer.window
    return min(edges[first], low) - margin, max(edges[last + 1], high) + margin
