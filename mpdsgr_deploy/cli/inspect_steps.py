"""The output of `mpdsgr inspect BUNDLE --steps`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpdsgr_deploy.attacks.condition import CLEAN, WORST
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.cli.output import print_json, print_table
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.validation.image_checks import chosen_images

if TYPE_CHECKING:
    from mpdsgr_deploy.exporting.step_table import StepCost

IMAGES = 350  # the number of tier `commit`
LEGEND = """\
worst: correct under every attack of tier commit. lost: images that are correct
with all time steps and wrong with fewer; regained: the reverse. ms: milliseconds
per image with onnxruntime-cpu. MMACs: million multiply-accumulate operations."""


def inspect_steps(bundle: Bundle, *, plots: Path | None, root: str | None, images: int | None, as_json: bool) -> None:
    """Attack and time a bundle's networks at 1 to T time steps, print the results, and plot them to `plots`."""
    need("onnxscript", "train")
    from mpdsgr_deploy.exporting.step_table import step_costs

    sample = chosen_images(bundle, images, IMAGES, None, root)
    where = name_sample(len(sample), bundle.manifest.recipe.data.name)
    rows = step_costs(bundle, sample)
    if plots is not None:
        from mpdsgr_deploy.diagnostics.step_plots import plot_steps

        plot_steps({precision: accuracies(rows, precision) for precision in bundle.manifest.variants}, where, plots)
    if as_json:
        print_json({"measured on": where, "tier": "commit", "steps": [as_record(row) for row in rows]})
        return
    title = f"at 1 to {bundle.manifest.recipe.encoding.T} steps on {where}"
    click.echo(LEGEND)
    table = [cells(row) for row in rows]
    print_table(list(table[0]), [list(row.values()) for row in table], title)


def accuracies(rows: "Sequence[StepCost]", precision: str) -> dict[str, list[float]]:
    """Return the clean and the worst accuracy of one precision, in %, for 1 to T steps."""
    chosen = [row for row in rows if row.precision == precision]
    return {name: [100 * row.correct[name] / row.n for row in chosen] for name in (CLEAN, WORST)}


def as_record(row: "StepCost") -> dict[str, Any]:
    return row._asdict() | {"flips": {name: flips._asdict() for name, flips in row.flips.items()}}


def cells(row: "StepCost") -> dict[str, str]:
    percent = {f"{name} %": f"{100 * correct / row.n:.1f}" for name, correct in row.correct.items()}
    flips = {
        f"{name} lost, regained": f"{pair.lost}, {pair.regained}"
        for name, pair in row.flips.items()
        if name in (CLEAN, WORST)
    }
    times = {f"ms, batch {size}": f"{value:.3g}" for size, value in row.milliseconds.items()}
    return {
        "precision": row.precision,
        "steps": str(row.steps),
        **percent,
        **flips,
        **times,
        "MMACs": f"{row.macs / 1e6:.3g}",
    }
