"""The tables of layers that `mpdsgr inspect` shows."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mpdsgr_deploy.diagnostics.layer_statistics import LayerStatistics
from mpdsgr_deploy.diagnostics.spike_flips import SpikeFlips


class Table(NamedTuple):
    """A table to print; each row has one cell per column."""

    columns: list[str]
    rows: list[list[object]]
    title: str


def membrane_table(statistics: Sequence[LayerStatistics], where: str) -> Table:
    """Return a table of layers. where: description of the images, for the title."""
    # with spaces in place of underscores, a narrow terminal can break the headings
    columns = [name.replace("_", " ") for name in LayerStatistics._fields]
    rows: list[list[object]] = [
        [f"{v:.3f}" if isinstance(v, float) else v or "" for v in layer] for layer in statistics
    ]
    return Table(columns, rows, f"membrane statistics on {where}")


def flip_table(flips: SpikeFlips, precisions: Mapping[str, str], where: str) -> Table:
    """Return a table of a variant's layers, averaged over steps.

    precisions: the precision in which each layer multiplies, by layer. where: description of the images, for the title.
    """
    rows: list[dict[str, object]] = []
    for layer in flips.layers():
        steps = [step for step in flips.steps if step.layer == layer]
        rows.append(
            {
                "layer": layer,
                "computes in": precisions.get(layer, ""),
                "flips %": f"{100 * flips.mean('rate', layer):.3f}",
                "at the first step": f"{100 * steps[0].rate:.3f}",
                "at the last": f"{100 * steps[-1].rate:.3f}",
                "by its own rounding": f"{100 * flips.mean('fresh', layer):.3f}",
                "mean |change|": f"{flips.mean('moved', layer):.2g}",
                "density": f"{flips.mean('density', layer):.3f}",
                "images that drift from here": sum(step.first for step in steps),
            }
        )
    changed = f"{flips.labels_changed} of {flips.n} labels changed ({flips.labels_changed / flips.n:.1%})"
    title = f"{flips.precision} against fp32 on {where}: {changed}, {flips.unflipped} images without a flip"
    return Table(list(rows[0]), [list(row.values()) for row in rows], title)
