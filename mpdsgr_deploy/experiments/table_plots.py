"""Plot the pictures of a table's page, as PNG files."""

import io
from collections.abc import Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mpdsgr_deploy.attacks.condition import CLEAN, PGD
from mpdsgr_deploy.checkpoint import VALIDATION_PGD
from mpdsgr_deploy.diagnostics import picture
from mpdsgr_deploy.diagnostics.membrane_plots import AXIS, Line, draw_membranes
from mpdsgr_deploy.diagnostics.picture import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    OLIVE,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    VIOLET,
    plain,
)
from mpdsgr_deploy.experiments.records import Measured, Record
from mpdsgr_deploy.experiments.row_comparison import (
    SHOWN,
    STRONG,
    adversarial,
    by_eps,
    cell,
    defences,
    groups,
    published_figures,
    strong_curves,
)
from mpdsgr_deploy.experiments.table import TableSpec

DOTS = {"clean": picture.CLEAN, "FGSM": picture.FGSM, "PGD": picture.PGD, "union": picture.UNION}
PALETTE = (BLACK, VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY_BLUE, GREY, OLIVE, VIOLET)
LINES = ("-", "--", ":", "-.")
COLOURS_OF_A_FILE = 128


def small_png(figure: Figure) -> bytes:
    """Return a figure as a small PNG file; the same figure gives the same bytes."""
    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120, metadata={"Software": None})
    image = Image.open(drawn).convert("RGB")
    image.quantize(COLOURS_OF_A_FILE, dither=Image.Dither.NONE).save(out, format="png", optimize=True)
    return out.getvalue()


def accuracies(table: TableSpec, measured: Measured) -> bytes:
    """Plot each row's accuracy with its interval by condition; hollow markers show published figures."""
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(measured)), layout="constrained")
    axes = figure.subplots()
    stated = {title: published_figures(table, title) for title in measured}
    for offset, (heading, colour) in enumerate(DOTS.items()):
        for position, (title, records) in enumerate(measured.items()):
            height = position + 0.16 * (offset - 1.5)
            label = heading if position == 0 else None
            if accuracy := cell(records, {**SHOWN, **STRONG}[heading]):
                axes.plot(accuracy.interval, [height, height], color=colour, linewidth=1)
                axes.plot([accuracy.mean], [height], "o", color=colour, markersize=4, label=label)
            value = getattr(stated[title], SHOWN.get(heading, ""), None)
            if value is not None:
                axes.plot([value], [height], "o", color=colour, markersize=4, markerfacecolor="white")
    axes.set_yticks(range(len(measured)), list(measured))
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    hollow = "; filled: measured, hollow: published" if any(stated.values()) else ""
    axes.set_xlabel(f"accuracy (%){hollow}")
    plain(axes, "x")
    figure.legend(loc="outside upper center", ncols=len(DOTS), frameon=False)
    return small_png(figure)


def labels(records: Sequence[Record]) -> dict[str, str]:
    """Return the names of rows in a legend by row: the method, with the row's title if several rows share it."""
    methods = [record.recipe.method for record in records]
    return {r.row: m if methods.count(m) == 1 else f"{m} ({r.row})" for r, m in zip(records, methods, strict=True)}


def styles(measured: Measured) -> dict[str, tuple[str, str]]:
    """Return colour and line style by row. Rows whose defences differ in adversarial training alone share a colour."""
    methods: dict[tuple[str, ...], int] = {}
    rows_of: dict[tuple[tuple[str, ...], bool], int] = {}
    looks = {}
    for title, records in measured.items():
        attacked = adversarial(records[0])
        method = tuple(name for name in defences(records[0]) if name not in attacked)
        colour = methods.setdefault(method, len(methods))
        number = rows_of.setdefault((method, bool(attacked)), 0)
        rows_of[method, bool(attacked)] += 1
        looks[title] = PALETTE[colour % len(PALETTE)], LINES[number % len(LINES)]
    return looks


def finish(axes: Axes, **texts: str) -> None:
    """Give axes of accuracies, which begin at 0, their texts (title, xlabel, ylabel) and a legend."""
    axes.set(**texts, ylim=(0, None))
    plain(axes)
    axes.legend(frameon=False, fontsize=8)


def growth(measured: Measured) -> bytes | None:
    """Plot the accuracy of every row's first precision under the strong PGD against eps, averaged over seeds.

    The values of eps are spaced equally on the axis, because rows differ most at small ones. None without such curves.
    """
    panels = groups({title: records for title, records in measured.items() if strong_curves(records)})
    if not panels:
        return None
    look = styles(measured)
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, group) in zip(columns, panels.items(), strict=True):
        names = labels([records[0] for records in group.values()])
        for row, records in group.items():
            values, (colour, line) = by_eps(records), look[row]
            axes.plot([*values.values()], line, color=colour, marker="o", markersize=3, label=names[row])
            axes.set_xticks(range(len(values)), [f"{255 * value:.3g}" for value in values])
        finish(axes, title=title, xlabel="eps (1/255)")
    columns[0].set_ylabel("accuracy under the strong PGD (%)")
    return small_png(figure)


def within_eps(table: TableSpec, measured: Measured) -> bytes | None:
    """Plot the accuracy of every row under PGD in the paper's setting against eps; None for a table without `eps`."""
    if not table.eps:
        return None
    names, look = labels([records[0] for records in measured.values()]), styles(measured)
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for row, records in measured.items():
        attack = records[0].recipe.attack
        conditions = {entry.values["eps"]: entry.name for entry in table.pgd_within(attack)}
        by_size = {0.0: CLEAN, **conditions, attack.eps: PGD}
        points = {255 * eps: accuracy.mean for eps in sorted(by_size) if (accuracy := cell(records, by_size[eps]))}
        colour, line = look[row]
        axes.plot([*points], [*points.values()], line, color=colour, marker="o", markersize=3, label=names[row])
    finish(axes, xlabel="eps (1/255)", ylabel="accuracy under PGD in the paper's setting (%)")
    return small_png(figure)


def attacked_by_epoch(measured: Measured) -> dict[str, Record]:
    """Return the first record of every row whose training attacked validation images after each epoch."""
    return {row: records[0] for row, records in measured.items() if VALIDATION_PGD in records[0].curve}


def by_epoch(measured: Measured) -> bytes | None:
    """Plot validation accuracy by epoch, clean and under PGD, for the first seed of the rows that logged both.

    None without such rows.
    """
    first = attacked_by_epoch(measured)
    if not first:
        return None
    names = labels([*first.values()])
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for (row, record), colour in zip(first.items(), cycle(PALETTE), strict=False):
        for curve, line, what in (("validation_accuracy", "-", "clean"), (VALIDATION_PGD, ":", "PGD")):
            values = [100 * value for value in record.curve[curve]]
            axes.plot(range(1, len(values) + 1), values, line, color=colour, label=f"{names[row]}, {what}")
    finish(axes, xlabel="epoch", ylabel="accuracy on validation images (%)")
    return small_png(figure)


def with_and_without(measured: Measured, defence: str | None) -> list[list[Record]]:
    """Return the first records of rows with and without `defence`, in groups without and with adversarial training.

    Rows with further defences are left out, and groups without a row of either kind. None gives no groups.
    """
    if defence is None:
        return []
    first = [records[0] for records in measured.values() if records[0].membranes]
    pairs = []
    for attacked in (False, True):
        plain_rows = [record for record in first if set(defences(record)) - {defence} == set(adversarial(record))]
        group = [record for record in plain_rows if bool(adversarial(record)) == attacked]
        if len({defence in defences(record) for record in group}) == 2:
            pairs.append(group)
    return pairs


def membranes(measured: Measured, defence: str | None) -> bytes | None:
    """Plot the membrane potentials of every layer with and without a defence, for the first seed.

    None if `with_and_without` finds no group.
    """
    rows = with_and_without(measured, defence)
    if not rows:
        return None
    layers, look = [membrane.layer for membrane in rows[0][0].membranes], styles(measured)
    figure = Figure(figsize=(1 + 2.4 * len(layers), 2.6 * len(rows)), layout="constrained")
    for line, group in zip(figure.subplots(len(rows), len(layers), squeeze=False), rows, strict=True):
        names = labels(group)
        lines = [Line(names[record.row], *look[record.row]) for record in group]
        for number, axes in enumerate(line):
            draw_membranes(axes, [(style, r.membranes[number]) for style, r in zip(lines, group, strict=True)])
        line[0].set_ylabel("density")
        line[0].legend(frameon=False, fontsize=7, loc="upper left")
    figure.supxlabel(AXIS, fontsize=9)
    return small_png(figure)
