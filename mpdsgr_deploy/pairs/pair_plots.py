"""Plot the membrane potentials of every layer and the training curves of two sides."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.claimed_directories import claim_directory
from mpdsgr_deploy.diagnostics.membrane_plots import AXIS, Line, draw_membranes
from mpdsgr_deploy.diagnostics.picture import BLUE, VERMILION, plain, png
from mpdsgr_deploy.pairs.differences import Curves, Differences
from mpdsgr_deploy.pairs.network_pair import LayerPair

MEMBRANES, CURVES = "membranes.png", "curves.png"
COLUMNS, PANEL = 4, (2.8, 2.4)  # largest number of panels in a row; width and height of a panel in inches
COLOURS, STYLES = (BLUE, VERMILION), ("-", "--")


def draw(differences: Differences, names: tuple[str, str], out: Path) -> list[str]:
    """Write membranes.png and curves.png to the directory `out`, if there are data for them, and return their names.

    names: those of A and B in the legend. Raises InputError if `out` holds other files.
    """
    pictures = {}
    lines = [Line(*look) for look in zip(names, COLOURS, STYLES, strict=True)]
    if differences.layers:
        pictures[MEMBRANES] = membranes(differences.layers, lines)
    if differences.curves:
        pictures[CURVES] = curves(differences.curves, lines)
    for number, (name, figure) in enumerate(pictures.items()):
        if number == 0:
            claim_directory(out, name, "set of plots")
        write_atomic(out / name, png(figure))
    return list(pictures)


def membranes(layers: list[LayerPair], lines: list[Line]) -> Figure:
    """Plot the potentials of both networks, one panel per layer."""
    figure, panels = _panels(len(layers))
    for axes, layer in zip(panels, layers, strict=False):
        draw_membranes(axes, list(zip(lines, layer.membranes, strict=True)))
    figure.supxlabel(AXIS, fontsize=9)
    figure.supylabel("density", fontsize=9)
    _legend(figure, panels[0])
    return figure


def curves(pairs: Curves, lines: list[Line]) -> Figure:
    """Plot the curves of both trainings, one panel per quantity."""
    figure, panels = _panels(len(pairs))
    for axes, (name, values) in zip(panels, pairs.items(), strict=False):
        for line, curve in zip(lines, values, strict=True):
            heights = [math.nan if value is None else value for value in curve]
            axes.plot(range(1, len(curve) + 1), heights, line.style, color=line.colour, label=line.label, marker=".")
        axes.set_title(name.replace("_", " "), fontsize=9)
        plain(axes)
    figure.supxlabel("epoch", fontsize=9)
    _legend(figure, panels[0])
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    rows, columns = math.ceil(count / COLUMNS), min(count, COLUMNS)
    figure = Figure(figsize=(PANEL[0] * columns + 1, PANEL[1] * rows + 0.8), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
