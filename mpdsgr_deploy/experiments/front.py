"""The front of a table: the networks that no other one beats both in clean accuracy and under all attacks."""

from statistics import fmean

from matplotlib.figure import Figure

from mpdsgr_deploy.attacks.condition import WORST
from mpdsgr_deploy.diagnostics.picture import BLACK, GREY, plain
from mpdsgr_deploy.experiments.markdown import markdown
from mpdsgr_deploy.experiments.page_parts import accuracy_on_test_set
from mpdsgr_deploy.experiments.point_labels import Label, place, unbeaten
from mpdsgr_deploy.experiments.records import Measured, Record
from mpdsgr_deploy.experiments.row_comparison import Cell, cell, validation_accuracy
from mpdsgr_deploy.experiments.table_plots import small_png
from mpdsgr_deploy.experiments.table_sections import complete

FRONT = "front.png"


def unions(measured: Measured) -> dict[str, Cell]:
    """Return the accuracy under all attacks by row, of rows that met all of them; empty if no image survives any."""
    compared = {row: records for row, records in measured.items() if complete(records)}
    found = {row: union for row, records in compared.items() if (union := cell(records, WORST)) is not None}
    return found if any(union.mean for union in found.values()) else {}


def points(measured: Measured, found: dict[str, Cell]) -> list[Label]:
    """Return clean accuracy on validation images, accuracy under all attacks, both in %, and the name of each row.

    found: what `unions` returned for `measured`.
    """
    return [(validation_accuracy(measured[row]), union.mean, row) for row, union in found.items()]


def whole_time(records: list[Record]) -> str:
    """Return the wall time of training from random weights on, averaged over seeds."""
    return f"{fmean(record.seconds_before + record.seconds for record in records) / 60:.1f} min"


def section(measured: Measured) -> str:
    """Show the rows of the front, from the most to the least robust one; empty if no image survives all attacks."""
    found = unions(measured)
    best = sorted(unbeaten(points(measured, found)), key=lambda point: -point[1])
    if not best:
        return ""
    rows = []
    for validation, _, row in best:
        records = measured[row]
        cells = [f"{validation:.1f}", accuracy_on_test_set(records), str(found[row]), whole_time(records)]
        rows.append([row, records[0].recipe.method, *cells])
    note = (
        "Rows that no other row beats in both `validation` (clean accuracy in % on all validation images) and `union`. "
        "`test`: clean accuracy on all test images, `-`: not measured. `training`: wall time from random weights on, "
        "with the runs whose weights a row started from."
    )
    table = markdown(["row", "method", "validation", "test", "union", "training"], rows)
    picture = f"![clean accuracy and what survives all attacks]({FRONT})"
    return f"## Clean accuracy and what survives all attacks\n\n{table}\n\n{note}\n\n{picture}"


def picture(measured: Measured) -> bytes | None:
    """Plot accuracy under all attacks, with its interval over images, against clean accuracy, one point per row.

    Rows of the front have labels with the wall time of their training. None if no image survives all attacks.
    """
    found = unions(measured)
    if not found:
        return None
    drawn = points(measured, found)
    best = unbeaten(drawn)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for clean, union, row in drawn:
        colour = BLACK if (clean, union, row) in best else GREY
        axes.plot([clean] * 2, found[row].interval, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot([clean], [union], "o", color=colour, markersize=5)
    axes.plot(*zip(*sorted((x, y) for x, y, _ in best), strict=True), color=BLACK, linewidth=0.5, linestyle=":")
    axes.set(xlabel="clean accuracy on validation images (%)", ylabel="right under all attacks (%)", ylim=(-2, None))
    plain(axes)
    figure.draw_without_rendering()  # the layout is final from here on, so pixel positions are too
    place(figure, axes, [(x, y, f"{row}, {whole_time(measured[row])}") for x, y, row in best])
    return small_png(figure)
