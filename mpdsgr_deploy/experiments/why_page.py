"""The page that explains the results of a study by the records of `explain`: `mpdsgr study NAME ROWS --why`."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpdsgr_deploy.diagnostics.picture import plain
from mpdsgr_deploy.experiments.explain import RECORDS, Explained, LayerFactors
from mpdsgr_deploy.experiments.markdown import markdown, publish
from mpdsgr_deploy.experiments.record_files import read_records
from mpdsgr_deploy.experiments.study import Study
from mpdsgr_deploy.experiments.table_plots import LINES, PALETTE, small_png

PAGE, PLOT = "WHY.md", "why.png"
FACTORS = ("leak", "weights", "surrogate")
KINDS = {"pgd": "strong PGD", "noise": "noise"}
PARTS = ("scale", "density", "filter")  # factors of the factor `weights`
DROPS = {"promised": "promised by the gradient", "pgd": "real: strong PGD", "noise": "real: random noise"}
DRAWN = {
    "surrogate": "surrogate's rms derivative",
    "weights": "weights: largest gain of the layer",
    "density": "of it, density: sparser spikes",
    "filter": "of it, the filters",
}
Networks = dict[str, list[Explained]]  # row -> its networks, one per seed
Value = Callable[[dict[str, Any]], float]  # a function of an entry of `Explained.sizes`


def load_networks(study: Study, folder: Path) -> Networks:
    """Return the records of a study's networks, in the order of its rows. Raises InputError as `read_records` does."""
    records = read_records(folder / RECORDS, Explained)
    rows = {row.title: [r for r in records if r.row == row.title] for row in study.table().rows}
    return {row: networks for row, networks in rows.items() if networks}


def write_why(study: Study, folder: Path) -> Path:
    rows = load_networks(study, folder)
    return publish(folder / PAGE, render(study, rows), {PLOT: draw(rows)})


def render(study: Study, rows: Networks) -> str:
    networks = [network for row in rows.values() for network in row]
    seeds = sorted({network.seed for network in networks})
    images = " and ".join(dict.fromkeys(network.images for network in networks))
    checkpoints = " and ".join(sorted({f"`{network.checkpoint}`" for network in networks}))
    parts = [
        f"# Why: {study.title}",
        f"Rendered from `{RECORDS}`, which `mpdsgr study NAME ROWS --why` writes. Means over seeds "
        f"{', '.join(map(str, seeds))}, on {images} that a network gets right; checkpoint: {checkpoints}.",
        f"![what perturbations promise and do, and the factors of the gradient]({PLOT})",
        "## What a perturbation promises and does",
        drops(rows),
        "## Spikes that a perturbation flips",
        flips(rows),
        "## What the surrogate gradient is made of",
        made_of(rows),
        "## Where it was measured",
        sources(networks),
    ]
    return "\n\n".join(parts) + "\n"


def sources(networks: list[Explained]) -> str:
    origins = (network.provenance for network in networks)
    lines = (
        f"{o['hardware']['cpu']}, {o['hardware']['cores']} cores; torch {o['packages']['torch']}, revision "
        f"{o['revision']}."
        for o in origins
    )
    return "\n".join(dict.fromkeys(lines))


def by_size(networks: list[Explained], value: Value) -> dict[float, float]:
    """Return means of `value` over seeds by eps, without networks that classify no image correctly."""
    values: dict[float, list[float]] = {}
    for network in networks:
        for size in network.sizes:
            if size["n"]:
                values.setdefault(size["eps"], []).append(value(size))
    return {eps: fmean(each) for eps, each in values.items()}


def drop(kind: str) -> Value:
    """Return a function for the drop of the margin, in units of the margin. kind: "promised", "pgd" or "noise"."""
    return lambda size: size[kind] / size["margin"]


def flipped(kind: str) -> Value:
    """Return a function for the share of flipped spikes, averaged over layers. kind: "pgd" or "noise"."""
    return lambda size: fmean(size[f"flipped_{kind}"].values())


def drops(rows: Networks) -> str:
    kinds = {"promised": "promised", **KINDS}
    note = (
        "Drops of the margin, in margins of the clean image: `promised` by the surrogate gradient; what follows from "
        "`strong PGD`, as many steps of eps / 4 as the study's strong attack has, and from `noise`. What lowers the "
        "promise alone masks; above 1 the image is lost on average."
    )
    return f"{table_by_eps(rows, 'drop', {name: drop(kind) for kind, name in kinds.items()}, 2)}\n\n{note}"


def flips(rows: Networks) -> str:
    note = "Share of spikes that differ from those of the clean image, mean over layers."
    return f"{table_by_eps(rows, 'by', {name: flipped(kind) for kind, name in KINDS.items()}, 4)}\n\n{note}"


def table_by_eps(rows: Networks, heading: str, values: dict[str, Value], digits: int) -> str:
    """Show the mean over seeds of each of `values` by row and eps; "-" if no network gets an image right."""
    sizes = sorted({size["eps"] for networks in rows.values() for network in networks for size in network.sizes})
    lines = []
    for row, networks in rows.items():
        for name, value in values.items():
            means = by_size(networks, value)
            lines.append([row, name, *(f"{means[eps]:.{digits}f}" if eps in means else "-" for eps in sizes)])
    return markdown(["row", heading, *(f"eps {eps:.3g}" for eps in sizes)], lines)


def mean_of(networks: list[Explained], number: int, factor: str) -> float:
    """Return a field of `LayerFactors` for layer `number`, averaged over seeds."""
    return fmean(getattr(network.layers[number], factor) for network in networks)


def made_of(rows: Networks) -> str:
    """Show the factors, each multiplied over all layers, as powers of two."""
    lines = []
    for row, networks in rows.items():
        totals = {factor: total(networks, factor) for factor in (*FACTORS, *PARTS)}
        product = sum(totals[factor] for factor in FACTORS)
        powers = [*(totals[factor] for factor in FACTORS), product, *(totals[part] for part in PARTS)]
        rates = [mean_of(networks, end, "firing_rate") for end in (0, -1)]
        margins = [network.sizes[0]["margin"] for network in networks if network.sizes[0]["n"]]
        margin = f"{fmean(margins):.2f}" if margins else "-"
        lines.append([row, *(f"{power:+.1f}" for power in powers), f"{rates[0]:.3f} / {rates[1]:.3f}", margin])
    note = (
        "Powers of two, over all layers: +1 doubles the estimate; `mpdsgr_deploy/experiments/explain.py` says what "
        "each factor is. "
        "Weights are scale, density and filter together: tdBN's scale, how much it multiplies sparse spikes with to "
        "give them the deviation it wants, and the filters themselves. A method whose surrogate factor falls while "
        "its weights' factor rises has moved the gradient, not removed it."
    )
    columns = ["row", *FACTORS, "product", *(f"weights: {part}" for part in PARTS)]
    return markdown([*columns, "firing rate, first / last layer", "margin"], lines) + f"\n\n{note}"


def total(networks: list[Explained], factor: str) -> float:
    """Return the binary logarithm of the product of a factor over layers, each layer averaged over seeds."""
    return sum(math.log2(mean_of(networks, number, factor)) for number in range(len(networks[0].layers)))


def draw(rows: Networks) -> bytes:
    """Plot drops by eps and flips by layer, and below them the factors by layer; return a PNG file.

    Methods differ in colour, settings in line style.
    """
    figure = Figure(figsize=(16, 7.5), layout="constrained")
    panels = figure.subplots(2, 4)
    for (row, networks), (colour, line) in zip(rows.items(), styles([*rows]), strict=True):
        style: Any = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3}
        for axes, kind in zip(panels[0], DROPS, strict=False):
            values = by_size(networks, drop(kind))
            axes.plot([*values], [*values.values()], label=row, **style)
        draw_flips(panels[0][3], networks, style)
        layers: list[LayerFactors] = networks[0].layers
        for axes, factor in zip(panels[1], DRAWN, strict=True):
            means = [mean_of(networks, number, factor) for number in range(len(layers))]
            axes.plot([layer.layer for layer in layers], means, **style)
    for axes, title in zip(panels[0], DROPS.values(), strict=False):
        axes.set(title=title, xlabel="eps", ylabel="drop of the margin / clean margin")
    for axes in panels[0][:2]:
        axes.axhline(1, color="black", linewidth=0.6)  # above it the image is lost on average
    panels[0][3].set(title="flipped by strong PGD at eps", ylabel="share of spikes")
    for axes, title in zip(panels[1], DRAWN.values(), strict=True):
        axes.set(title=title)
    for axes in (panels[0][3], *panels[1]):
        axes.set_ylim(0, None)
        axes.tick_params(axis="x", rotation=60, labelsize=8)
    for axes in panels.flat:
        plain(axes)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return small_png(figure)


def styles(rows: list[str]) -> list[tuple[str, str]]:
    """Return colour and line style of each row SETTING.METHOD: a colour per method, a line style per setting."""
    named = [row.split(".", 1) for row in rows]
    settings, methods = (list(dict.fromkeys(names)) for names in zip(*named, strict=True))
    return [(PALETTE[methods.index(m) % len(PALETTE)], LINES[settings.index(s) % len(LINES)]) for s, m in named]


def draw_flips(axes: Axes, networks: list[Explained], style: Any) -> None:
    """Draw the share of each layer's spikes that PGD flips at the recipe's eps, which is the last of SIZES but one."""
    flips_by_layer = [network.sizes[-2]["flipped_pgd"] for network in networks if network.sizes[-2]["n"]]
    if flips_by_layer:
        means = [fmean(flips[layer] for flips in flips_by_layer) for layer in flips_by_layer[0]]
        axes.plot([*flips_by_layer[0]], means, **style)
