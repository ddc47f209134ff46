"""Plot accuracy against the number of time steps. Torch is not needed."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.claimed_directories import claim_directory
from mpdsgr_deploy.diagnostics.picture import CLEAN, UNION, plain, png

PICTURE, LINES, MARKERS = "steps.png", ("-", "--", ":", "-."), "osD^"
# precision -> "clean" or "worst" -> accuracy in % for 1 to T steps
Accuracies = Mapping[str, Mapping[str, list[float]]]


def plot_steps(accuracies: Accuracies, title: str, out: Path) -> None:
    """Write steps.png. Raises InputError for a directory `out` that holds other files."""
    claim_directory(out, PICTURE, "plot of time steps")
    write_atomic(out / PICTURE, png(by_steps(accuracies, title)))


def by_steps(accuracies: Accuracies, title: str) -> Figure:
    """Plot clean and worst accuracy: a colour for each of the two, a line style and a marker for each precision."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (precision, by_condition), line, marker in zip(accuracies.items(), LINES, MARKERS, strict=False):
        for (name, percent), colour in zip(by_condition.items(), (CLEAN, UNION), strict=True):
            steps = range(1, len(percent) + 1)
            axes.plot(steps, percent, line, marker=marker, color=colour, label=f"{name}, {precision}")
    axes.set(xlabel="time steps", ylabel="accuracy (%)", ylim=(0, 102))
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)
    axes.legend(frameon=False)
    return figure
