"""Labels of points in a plot: which points to name, and where the labels go."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpdsgr_deploy.diagnostics.picture import DARK_GREY

LINE_HEIGHT = 9.0  # smallest distance between two labels, in points
Label = tuple[float, float, str]  # x, y, text


def unbeaten(points: Sequence[Label]) -> list[Label]:
    """Return the points that no other point beats: none is at least as high in both x and y, and higher in one."""
    return [p for p in points if not any(q[0] >= p[0] and q[1] >= p[1] and q[:2] != p[:2] for q in points)]


def place(figure: Figure, axes: Axes, texts: Sequence[Label]) -> None:
    """Place each label to the right of its point, moved down until it covers no other, with a line to the point.

    A label that would extend beyond the axes is placed to the left of its point.
    """
    scale = 72 / figure.dpi
    right = axes.bbox.x1 * scale
    boxes: list[tuple[float, float, float]] = []  # left, right and y of the labels that are placed, in points
    for x, y, text in sorted(texts, key=lambda label: -label[1]):
        at_x, at_y = (value * scale for value in axes.transData.transform((x, y)))
        width = 3.4 * len(text)
        to_left = at_x + 8 + width > right
        left = at_x - 8 - width if to_left else at_x + 8
        height = at_y
        while any(b[0] < left + width and left < b[1] and abs(b[2] - height) < LINE_HEIGHT for b in boxes):
            height -= 1
        boxes.append((left, left + width, height))
        axes.annotate(
            text,
            (x, y),
            fontsize=6,
            xytext=(-8 if to_left else 8, height - at_y),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": DARK_GREY},
        )
