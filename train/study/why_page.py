"""The page and the plot of why.py."""

import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import fmean

from explain import Explained, Layer, Why
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plots import png
from study_table import Study
from tabular import markdown

from mpdsgr_deploy.files import write_atomic

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#B2A300", "#7F3C8D")
FACTORS = ("leak", "weights", "surrogate")
Networks = dict[str, list[Explained]]  # row -> its networks, one a seed


def write_why(study: Study, folder: Path) -> Path:
    """Render WHY.md and its plot from why.json in `folder`."""
    why = Why.model_validate_json((folder / "why.json").read_bytes())
    rows = by_row(why)
    write_atomic(folder / "why.png", draw(rows))
    write_atomic(folder / "WHY.md", render(study, why, rows).encode())
    return folder / "WHY.md"


def by_row(why: Why) -> Networks:
    """Its networks."""
    rows: Networks = {}
    for network in why.networks:
        rows.setdefault(network.row, []).append(network)
    return rows


def render(study: Study, why: Why, rows: Networks) -> str:
    """The whole page."""
    machine = why.provenance["hardware"]
    seeds = sorted({network.seed for network in why.networks})
    parts = [
        f"# Why: {study.title}",
        "Rendered from `why.json`, which `train/study/why.py` writes. Means over seeds "
        f"{', '.join(map(str, seeds))}, on {why.images} that a network gets right.",
        "![what perturbations promise and do, and the factors of the gradient](why.png)",
        "## What a perturbation promises and does",
        drops(rows),
        "## Spikes that a perturbation flips",
        flips(rows),
        "## What the surrogate gradient is made of",
        made_of(rows),
        "## Where it was measured",
        f"{machine['cpu']}, {machine['cores']} cores; torch {why.provenance['packages']['torch']}, revision "
        f"{why.provenance['revision']}.",
    ]
    return "\n\n".join(parts) + "\n"


def by_size(networks: list[Explained], value: Callable[[dict], float]) -> dict[float, float]:
    """Means over seeds by eps; a network that got nothing right says nothing."""
    found: dict[float, list[float]] = {}
    for network in networks:
        for size in network.sizes:
            if size["n"]:
                found.setdefault(size["eps"], []).append(value(size))
    return {eps: fmean(values) for eps, values in found.items()}


def drop(kind: str) -> Callable[[dict], float]:
    """A drop of the margin in margins."""
    return lambda size: size[kind] / size["margin"]


def flipped(kind: str) -> Callable[[dict], float]:
    """The share of spikes that flip, mean over layers."""
    return lambda size: fmean(size[f"flipped_{kind}"].values())


def drops(rows: Networks) -> str:
    """By eps."""
    sizes = [*by_size(next(iter(rows.values())), drop("pgd"))]
    lines = []
    for row, networks in rows.items():
        for kind in ("promised", "pgd", "noise"):
            values = by_size(networks, drop(kind))
            lines.append([row, kind, *(f"{values[eps]:.2f}" for eps in sizes)])
    note = (
        "Drops of the margin, in margins of the clean image: `promised` by the surrogate gradient, `pgd` and `noise` "
        "what follows. What lowers the promise alone masks; above 1 the image is lost on average."
    )
    return markdown(["row", "drop", *(f"eps {eps:.3g}" for eps in sizes)], lines) + f"\n\n{note}"


def flips(rows: Networks) -> str:
    """By eps."""
    sizes = [*by_size(next(iter(rows.values())), flipped("pgd"))]
    lines = []
    for row, networks in rows.items():
        for kind in ("pgd", "noise"):
            values = by_size(networks, flipped(kind))
            lines.append([row, kind, *(f"{values[eps]:.4f}" for eps in sizes)])
    note = "Share of spikes that differ from those of the clean image, mean over layers."
    return markdown(["row", "by", *(f"eps {eps:.3g}" for eps in sizes)], lines) + f"\n\n{note}"


def mean_of(networks: list[Explained], number: int, factor: str) -> float:
    """Of a factor of one layer over seeds."""
    return fmean(getattr(network.layers[number], factor) for network in networks)


def made_of(rows: Networks) -> str:
    """The factors, multiplied over layers, as powers of two, and the first and last layer's."""
    lines = []
    for row, networks in rows.items():
        count = len(networks[0].layers)
        totals = [sum(math.log2(mean_of(networks, n, factor)) for n in range(count)) for factor in FACTORS]
        ends = [f"{mean_of(networks, 0, f):.2f} / {mean_of(networks, count - 1, f):.2f}" for f in FACTORS[1:]]
        margin = fmean(network.sizes[0]["margin"] for network in networks)
        rates = [mean_of(networks, n, "firing_rate") for n in (0, count - 1)]
        cells = [*(f"{total:+.1f}" for total in totals), f"{sum(totals):+.1f}", *ends]
        lines.append([row, *cells, f"{rates[0]:.3f} / {rates[1]:.3f}", f"{margin:.2f}"])
    note = (
        "Powers of two, over all layers: +1 doubles the bound. Weights and surrogate also for the first / last layer. "
        "A method whose surrogate factor falls while its weights' factor rises has moved the gradient, not removed it."
    )
    columns = ["row", *FACTORS, "product", "weights", "surrogate", "firing rate, first / last", "margin"]
    return markdown(columns, lines) + f"\n\n{note}"


def draw(rows: Networks) -> bytes:
    """Drops by eps, flips by layer, and factors by layer."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = figure.subplots(2, 3)
    for (row, networks), colour in zip(rows.items(), cycle(COLOURS), strict=False):
        for axes, kind in zip(panels[0], ("promised", "pgd", "noise"), strict=True):
            values = by_size(networks, drop(kind))
            axes.plot([*values], [*values.values()], "o-", color=colour, markersize=3, label=row)
        draw_flips(panels[1][0], networks, colour)
        for axes, factor in zip(panels[1][1:], ("weights", "surrogate"), strict=True):
            layers: list[Layer] = networks[0].layers
            values = [mean_of(networks, number, factor) for number in range(len(layers))]
            axes.plot([layer.layer for layer in layers], values, "o-", color=colour, markersize=3)
    titles = ("promised by the gradient", "real, under PGD", "real, under random noise")
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set(title=f"drop of the margin {title}", xlabel="eps", ylabel="margins")
    headings = (
        "spikes flipped by PGD at the recipe's eps",
        "largest gain of the weights",
        "surrogate's rms derivative",
    )
    for axes, title in zip(panels[1], headings, strict=True):
        axes.set(title=title, ylim=(0, None))
        axes.tick_params(axis="x", rotation=60, labelsize=8)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return png(figure)


def draw_flips(axes: Axes, networks: list[Explained], colour: str) -> None:
    """Share of each layer's spikes that PGD flips at the recipe's eps, which is the last size but one."""
    at = [network.sizes[-2]["flipped_pgd"] for network in networks if network.sizes[-2]["n"]]
    if at:
        axes.plot([*at[0]], [fmean(found[layer] for found in at) for layer in at[0]], "o-", color=colour, markersize=3)
