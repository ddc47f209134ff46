"""Colours and axes of all matplotlib figures, and figures as PNG files or arrays."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

# Okabe and Ito's colours (jfly.uni-koeln.de/color), which colour-blind readers can tell apart
BLACK = "#000000"
BLUE = "#0072B2"
GREEN = "#009E73"
GREY = "#999999"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY_BLUE = "#56B4E9"
VERMILION = "#D55E00"
YELLOW = "#F0E442"

# For further lines of a crowded figure, and for backgrounds
OLIVE, VIOLET = "#B2A300", "#7F3C8D"
DARK_GREY, MIDDLE_GREY, LIGHT_GREY, GRID = "#555555", "#777777", "#BBBBBB", "#888888"

# By condition, in the figures of tables
CLEAN, FGSM, PGD, UNION = "#8a94a6", "#2563eb", "#d97706", "#b91c1c"


def plain(axes: Axes, grid: Any = "both") -> None:
    """Give axes a light grid along `grid` ("x", "y" or "both"), and no frame at the top and the right."""
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Return the figure as an RGB image [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB"))
