"""The output of `mpdsgr inspect A B`."""

from operator import attrgetter
from pathlib import Path
from typing import Any

import click

from mpdsgr_deploy.cli.output import print_json, print_sentence, print_table
from mpdsgr_deploy.pairs.differences import Differences, compare
from mpdsgr_deploy.pairs.side import Side, read_side

COLUMNS = ("A fires", "B fires", "differ", "A near", "B near", "overlap")  # columns of the table of layers
LEGEND = """fires: spikes per neuron and time step; differ: spikes that differ;
near: potentials in the surrogate's window; overlap: how far the histograms of
the potentials overlap"""
FLIPS = attrgetter("newly_wrong", "newly_right", "p_text")


def inspect_pair(a: str, b: str, *, plots: Path | None, root: str | None, images: int, as_json: bool) -> None:
    """Compare what two paths hold, print the differences, and plot them to the directory `plots`."""
    sides = read_side(a), read_side(b)
    differences = compare(*sides, root=root, images=images)
    drawn = []
    if plots is not None:
        from mpdsgr_deploy.pairs.pair_plots import draw

        drawn = draw(differences, (f"A: {a}", f"B: {b}"), plots)
    if as_json:
        print_json(as_record(*sides, differences))
        return
    for letter, side in zip("AB", sides, strict=True):
        print_sentence(f"{letter}: {side.kind} {side.name}")
    print_differences(differences)
    if plots is not None:
        print_sentence(f"{' and '.join(drawn)} in {plots}" if drawn else f"there was nothing to plot in {plots}")


def as_record(a: Side, b: Side, differences: Differences) -> dict[str, Any]:
    """Return the comparison as JSON values, where each pair has the value of A and that of B."""
    layers = [{name: value for name, value in x._asdict().items() if name != "membranes"} for x in differences.layers]
    verdicts = [
        {"condition": v.condition, "n": v.n, "right": v.right, "only_a": v.flips.newly_wrong}
        | {"only_b": v.flips.newly_right, "p_value": v.flips.p_value}
        for v in differences.verdicts
    ]
    sides = {name: {"path": side.name, "kind": side.kind} for name, side in (("a", a), ("b", b))}
    return sides | differences._asdict() | {"layers": layers, "verdicts": verdicts}


def print_differences(differences: Differences) -> None:
    """Print tables of the differences, and a line for each part that was left out."""
    if differences.settings:
        settings = [(name, *map(_text, pair)) for name, pair in differences.settings.items()]
        print_table(("setting", "A", "B"), settings)
    else:
        click.echo("all settings are equal")
    if differences.curves:
        curves = [(name.replace("_", " "), *map(_course, pair)) for name, pair in differences.curves.items()]
        print_table(("first > last epoch", "A", "B"), curves)
    if differences.layers:
        layers = [
            (layer.layer, *map(_percent, (*layer.firing_rate, layer.spikes_differ, *layer.in_window, layer.overlap)))
            for layer in differences.layers
        ]
        click.echo(LEGEND)
        print_table(("layer", *COLUMNS), layers, f"% on {differences.measured_on}")
    if differences.verdicts:
        verdicts = [
            (pair.condition, *(f"{100 * right / pair.n:.1f}" for right in pair.right), *FLIPS(pair.flips))
            for pair in differences.verdicts
        ]
        title = f"% of {differences.verdicts[0].n} images correct, images that only one has correct, McNemar's p"
        print_table(("condition", "A", "B", "only A", "only B", "p"), verdicts, title)
    for part, reason in differences.left_out.items():
        print_sentence(f"not compared: {part}: {reason}")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _course(values: list[Any]) -> str:
    return f"{_text(values[0])} > {_text(values[-1])}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
