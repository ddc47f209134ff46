"""Plot the pictures of a study's page, as PNG files."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpdsgr_deploy.attacks.condition import CLEAN, WORST
from mpdsgr_deploy.diagnostics.picture import BLACK, GREEN, GREY, ORANGE, VERMILION, plain
from mpdsgr_deploy.experiments.effect import (
    CONDITIONS,
    HELPS,
    HURTS,
    MASKS,
    OPEN,
    Pair,
    effect,
    emptied,
    verdict,
)
from mpdsgr_deploy.experiments.point_labels import Label, place, unbeaten
from mpdsgr_deploy.experiments.records import Measured
from mpdsgr_deploy.experiments.row_comparison import cell
from mpdsgr_deploy.experiments.study import Study
from mpdsgr_deploy.experiments.table_plots import small_png

DRAWN = ("PGD", "Square", "union")
BASELINE = BLACK
COLOURS = {HELPS: GREEN, MASKS: ORANGE, HURTS: VERMILION, OPEN: GREY}
NAMED = 6  # number of losses that have a label, the largest ones


def method_names(study: Study) -> dict[str, str]:
    """Return the display names of methods by name: the label, or else the names of the defences."""
    table = study.table()
    titles: dict[str, str] = {}
    for setting, method in study.pairs():
        if method.name not in titles:
            training = table.recipe(table.row(study.title_of(setting, method)), study.seeds[0]).method
            titles[method.name] = method.label or training
    values = list(titles.values())
    return {name: title if values.count(title) == 1 else f"{title} ({name})" for name, title in titles.items()}


def effects(study: Study, compared: list[Pair]) -> bytes:
    """Plot each effect with its interval under PGD in the paper's setting, under Square, and under all attacks."""
    names = method_names(study)
    figure = Figure(figsize=(13, 1.2 + 0.24 * len(compared)), layout="constrained")
    panels = figure.subplots(1, len(DRAWN), sharex=True, sharey=True)
    for axes, heading in zip(panels, DRAWN, strict=True):
        for position, pair in enumerate(compared):
            if (gained := effect(pair.records, pair.baseline, CONDITIONS[heading])) is not None:
                colour = COLOURS[HELPS if gained.low > 0 else HURTS if gained.high < 0 else OPEN]
                axes.plot([gained.low, gained.high], [position, position], color=colour)
                axes.plot([gained.mean], [position], "o", color=colour, markersize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(f"points under {heading}")
        plain(axes, "x")
    panels[0].set_yticks(range(len(compared)), [f"{p.setting.name}: {names[p.method.name]}" for p in compared])
    panels[0].set_ylim(len(compared) - 0.5, -0.5)
    figure.suptitle("colour: the interval excludes zero", fontsize=9)
    return small_png(figure)


def dose(study: Study, compared: list[Pair]) -> bytes:
    """Plot the effect under all attacks against the decrease of Omega, one point per method and setting.

    Points with the verdict helps or masks, and the largest of those with the verdict hurts, have labels.
    """
    names = method_names(study)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    decided: list[tuple[str, Label]] = []
    for setting, method, records, baseline in compared:
        if (union := effect(records, baseline, WORST)) is None:
            continue
        colour, x = COLOURS[verdict(records, baseline)], emptied(records, baseline)
        axes.plot([x, x], [union.low, union.high], color=colour, linewidth=0.6, alpha=0.5)
        axes.plot([x], [union.mean], "o", color=colour, markersize=5)
        if colour != COLOURS[OPEN]:
            decided.append((colour, (x, union.mean, f"{setting.name}: {names[method.name]}")))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="Omega less than the baseline's", ylabel="points more under all attacks")
    exceptions = [label for colour, label in decided if colour != COLOURS[HURTS]]
    largest = sorted((label for colour, label in decided if colour == COLOURS[HURTS]), key=lambda label: label[1])
    finish(figure, axes, [*exceptions, *largest[:NAMED]])
    return small_png(figure)


def front(study: Study, measured: Measured, compared: list[Pair]) -> bytes:
    """Plot accuracy under all attacks, with its interval over images, against clean accuracy, one point per row.

    Rows that no other row beats in both, and those with the verdict helps or masks, have labels.
    """
    methods = method_names(study)
    names = {study.title_of(s, m): f"{s.name}: {methods[m.name]}" for s, m in study.pairs()}
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    verdicts = {pair.records[0].row: verdict(pair.records, pair.baseline) for pair in compared}
    points: list[Label] = []
    for title, records in measured.items():
        clean, union = cell(records, CLEAN), cell(records, WORST)
        if clean is None or union is None:
            continue
        colour = COLOURS[verdicts[title]] if title in verdicts else BASELINE
        axes.plot([clean.mean] * 2, union.interval, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot([clean.mean], [union.mean], "o", color=colour, markersize=5)
        points.append((clean.mean, union.mean, names[title]))
    best = unbeaten(points)
    axes.plot(*zip(*sorted((x, y) for x, y, _ in best), strict=True), color=BASELINE, linewidth=0.5, linestyle=":")
    axes.set(xlabel="clean accuracy (%)", ylabel="right under all attacks (%)")
    axes.plot([], [], "o", color=BASELINE, label="baseline")
    exceptions = {names[row] for row, word in verdicts.items() if word in (HELPS, MASKS)}
    finish(figure, axes, [point for point in points if point in best or point[2] in exceptions])
    return small_png(figure)


def finish(figure: Figure, axes: Axes, texts: Sequence[Label]) -> None:
    """Add the labels of points, and a legend of the colours beside the axes."""
    for name, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=name)
    plain(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.draw_without_rendering()  # the layout is final from here on, so pixel positions are too
    place(figure, axes, texts)
