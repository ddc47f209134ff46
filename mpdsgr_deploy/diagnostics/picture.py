"""Matplotlib figures in a common style, as files and as arrays."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image


def plain(axes: Axes, grid: Any = "both") -> None:
    """Style axes with a light grid, and without a frame above and to the right."""
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Return the figure as an image [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB"))
