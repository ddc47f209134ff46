"""Plot membrane potentials of several networks together, layer by layer."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from mpdsgr_deploy.diagnostics.membrane import Membrane
from mpdsgr_deploy.diagnostics.picture import YELLOW, plain

AXIS = "U - V_th; yellow: the surrogate's gradient is not zero"
DRAWN = (-4, 3)  # range of U - V_th that is plotted


class Line(NamedTuple):
    """How one network is drawn: its name in the legend, its colour and matplotlib's line style."""

    label: str
    colour: str
    style: str


def draw_membranes(axes: Axes, networks: Sequence[tuple[Line, Membrane]]) -> None:
    """Draw one layer of several networks as densities of U - V_th, with the window of the first network."""
    for (label, colour, style), membrane in networks:
        edges = [membrane.start + membrane.width * step for step in range(len(membrane.share) + 1)]
        density = [share / membrane.width for share in membrane.share]
        axes.stairs(density, edges, color=colour, linestyle=style, label=label)
    first = networks[0][1]
    axes.axvspan(-first.half_width, first.half_width, color=YELLOW, alpha=0.35, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_title(first.layer, fontsize=9)
    axes.set_xlim(*DRAWN)
    plain(axes, "y")
