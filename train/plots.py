"""The pictures of a table's page, as PNG files. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measured import SHOWN, STRONG, Measured, by_eps, cell, defences, figures, groups, grown
from result import Result
from table import Table

DOTS = {"clean": "#8a94a6", "FGSM": "#2563eb", "PGD": "#d97706", "union": "#b91c1c"}
METHODS = {
    "": "#000000",
    "rat": "#E69F00",
    "sr": "#009E73",
    "stog": "#56B4E9",
    "dlif": "#CC79A7",
    "feel": "#999999",
    "mpd-sgr": "#D55E00",
}
ESTIMATORS = {"theorem": "-", "empirical": "--"}
WINDOW = "#F0E442"


def png(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()


def accuracies(table: Table, measured: Measured) -> bytes:
    """Each row's accuracy by condition with its interval; hollow where a figure is published."""
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(measured)), layout="constrained")
    axes = figure.subplots()
    for offset, (heading, colour) in enumerate(DOTS.items()):
        for position, (title, results) in enumerate(measured.items()):
            height = position + 0.16 * (offset - 1.5)
            label = heading if position == 0 else None
            if own := cell(results, {**SHOWN, **STRONG}[heading]):
                low, high = own.interval
                axes.plot([low, high], [height, height], color=colour, linewidth=1)
                axes.plot([own.mean], [height], "o", color=colour, markersize=4, label=label)
            stated = figures(table, title)
            value = getattr(stated, SHOWN.get(heading, ""), None)
            if value is not None:
                axes.plot([value], [height], "o", color=colour, markersize=4, markerfacecolor="white")
    axes.set_yticks(range(len(measured)), list(measured))
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    hollow = "; filled: measured, hollow: published" if any(figures(table, title) for title in measured) else ""
    axes.set_xlabel(f"accuracy (%){hollow}")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(DOTS), frameon=False)
    return png(figure)


def growth(measured: Measured) -> bytes | None:
    """Accuracy of the first exported network of every row under the strong PGD, against eps; means over seeds.

    None where no evaluation came so far.
    """
    shown = groups({title: results for title, results in measured.items() if grown(results)})
    if not shown:
        return None
    figure = Figure(figsize=(5.5 * len(shown), 4.2), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (title, group) in zip(panels, shown.items(), strict=True):
        for results in group.values():
            draw_growth(axes, results)
        axes.set(title=title, xlabel="eps (1/255)", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("accuracy under the strong PGD (%)")
    return png(figure)


def draw_growth(axes: Axes, results: list[Result]) -> None:
    """One row's line."""
    values = by_eps(results)
    colour, line = style(results[0])
    eps = [255 * value for value in values]
    axes.plot(eps, [*values.values()], line, color=colour, marker="o", markersize=3, label=results[0].row)
    axes.set_xticks(eps, [f"{value:.3g}" for value in eps])


def style(result: Result) -> tuple[str, str]:
    """Colour by method, line by estimator."""
    (method,) = [name for name in defences(result) if name != "at"] or [""]
    estimator = result.recipe.defence.get("mpd-sgr", {}).get("estimator", "theorem")
    return METHODS[method], ESTIMATORS[estimator]


def membranes(measured: Measured) -> bytes | None:
    """Every layer's membrane potentials with MPD-SGR and without, of the first seed; None without such a pair."""
    rows = pairs(measured)
    if not rows:
        return None
    layers = [membrane.layer for membrane in rows[0][0].membranes]
    figure = Figure(figsize=(1 + 2.4 * len(layers), 2.6 * len(rows)), layout="constrained")
    for line, group in zip(figure.subplots(len(rows), len(layers), squeeze=False), rows, strict=True):
        for number, axes in enumerate(line):
            draw_layer(axes, group, number)
        line[0].set_ylabel("density")
        line[0].legend(frameon=False, fontsize=7, loc="upper left")
    figure.supxlabel("U - V_th; yellow: where the surrogate passes a gradient", fontsize=9)
    return png(figure)


def pairs(measured: Measured) -> list[list[Result]]:
    """What is compared: networks without adversarial training, and those with it."""
    return [group for adversarial in (False, True) if len(group := compared(measured, adversarial)) > 1]


def compared(measured: Measured, adversarial: bool) -> list[Result]:
    """First seeds of the rows without another defence than MPD-SGR."""
    first = [results[0] for results in measured.values() if results[0].membranes]
    wanted = {"at"} if adversarial else set()
    return [result for result in first if set(defences(result)) - {"mpd-sgr"} == wanted]


def draw_layer(axes: Axes, group: list[Result], number: int) -> None:
    """One layer of several networks."""
    for result in group:
        membrane = result.membranes[number]
        edges = [membrane.start + membrane.width * step for step in range(len(membrane.share) + 1)]
        colour, line = style(result)
        density = [share / membrane.width for share in membrane.share]
        axes.stairs(density, edges, color=colour, linestyle=line, label=result.row)
    half = group[0].membranes[number].half_width
    axes.axvspan(-half, half, color=WINDOW, alpha=0.35, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_title(f"{group[0].membranes[number].layer}", fontsize=9)
    axes.set_xlim(-4, 3)
    axes.spines[["top", "right"]].set_visible(False)
