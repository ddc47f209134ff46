"""mpdsgr inspect"""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import click

from mpdsgr_deploy.bundle import MANIFEST, open_bundle
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.diagnostics.statistics import LayerStatistics, warnings_of
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.recipe import Recipe

LAST_EPOCH = "the last epoch's first validation batch"


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--plots", type=click.Path(path_type=Path), help="Directory to draw the membrane's distributions into.")
@click.option("--root", help="With --plots: where the data set lies.  [default: the recipe's]")
@click.option("--layer", "chosen", multiple=True, metavar="NAME", help="With --plots: draw this layer, not all.")
@click.option("--channel", "channels", multiple=True, type=click.IntRange(0), help="With --plots: draw this one too.")
@click.option("--images", type=click.IntRange(1), help="With --plots: how many test images.  [default: 128]")
@json_option
def command(
    path: Path,
    plots: Path | None,
    root: str | None,
    chosen: tuple[str, ...],
    channels: tuple[int, ...],
    images: int | None,
    as_json: bool,
) -> None:
    """Show what PATH holds: a bundle, a training run or a checkpoint. Verifies every hash on the way.

    --plots measures a training run's or a checkpoint's network anew, on test images, and draws the potentials of every
    layer, step and channel beside the Gaussians of Theorem 1 and the surrogate's window.

    \b
    Example:
      mpdsgr inspect bundles/digits
      mpdsgr inspect runs/digits --plots plots/digits
    """
    is_bundle = (path / MANIFEST).exists()
    if plots is None and (root or chosen or channels or images):
        raise InputError("--root, --layer, --channel and --images say what to draw; add --plots DIRECTORY")
    if plots is not None and is_bundle:
        raise InputError(f"--plots draws a training run or a checkpoint; {path} is a bundle")
    facts, layers = bundle_facts(path) if is_bundle else checkpoint_facts(path)
    measured_on = LAST_EPOCH
    if plots is not None:
        need("matplotlib", "report")
        need("torch", "train")
        from mpdsgr_deploy.diagnostics.checkpoint import plot_checkpoint

        measured_on, layers = plot_checkpoint(
            path, plots, root=root, layers=chosen, channels=channels, images=images or 128
        )
    warnings = warnings_of(layers)
    if as_json:
        print_json({**facts, "layers": [layer._asdict() for layer in layers], "warnings": warnings})
        return
    print_table(("", str(path)), [(name, value) for name, value in facts.items()])
    if layers:
        headings = [name.replace("_", " ") for name in LayerStatistics._fields]  # may break between words
        rows = [[f"{v:.3f}" if isinstance(v, float) else v or "" for v in layer] for layer in layers]
        print_table(headings, rows, f"membrane statistics on {measured_on}")
    for line in warnings:
        click.echo(f"warning: {line}")
    if plots is not None:
        click.echo(f"plots in {plots}")


def bundle_facts(path: Path) -> tuple[dict[str, Any], list[LayerStatistics]]:
    """What a verified bundle's manifest and ONNX files say."""
    import onnx

    bundle = open_bundle(path)
    manifest, recipe = bundle.manifest, bundle.manifest.recipe
    facts: dict[str, Any] = {
        "kind": "bundle, every hash verified",
        "input": f"{manifest.input_name}: float32 [B, {', '.join(map(str, manifest.input_shape))}] in [0, 1]",
        **{f"noise {x.name}": f"{x.kind}, float32 [B, {', '.join(map(str, x.shape))}]" for x in manifest.noise},
        "labels": ", ".join(manifest.labels[:10]) + (" ..." if len(manifest.labels) > 10 else ""),
        **describe(recipe),
    }
    for precision, variant in manifest.variants.items():
        graph = onnx.load(bundle.variant(precision)).graph
        nodes = Counter(node.op_type for node in graph.node)
        facts[f"{precision} parameters"] = sum(prod(i.dims) for i in graph.initializer if len(i.dims) > 0)
        facts[f"{precision} bytes"] = bundle.variant(precision).stat().st_size
        facts[f"{precision} nodes"] = ", ".join(f"{count} {op}" for op, count in nodes.most_common())
        if variant.accuracy:
            found = variant.accuracy
            facts[f"{precision} at export"] = f"{found.correct} of {found.n} {found.data} test images correct"
    return facts, []


def checkpoint_facts(path: Path) -> tuple[dict[str, Any], list[LayerStatistics]]:
    """What a verified checkpoint says of itself and of its layers in its last epoch."""
    checkpoint = load_checkpoint(find_checkpoint(path))
    facts = {
        "kind": "checkpoint, hash verified",
        "data": checkpoint.recipe.data.name,
        **describe(checkpoint.recipe),
        "epoch": f"{checkpoint.epoch} of {checkpoint.recipe.training.epochs}",
        **{name: f"{value:.4f}" for name, value in checkpoint.metrics.items()},
        "created": checkpoint.provenance.get("created", "unknown"),
    }
    layers = checkpoint.history[-1]["layers"] if checkpoint.history else []
    return facts, [LayerStatistics(**layer) for layer in layers]


def describe(recipe: Recipe) -> dict[str, Any]:
    """The network and its training in a few lines."""
    model, neuron, encoding = recipe.model, recipe.neuron, recipe.encoding
    return {
        "model": f"{model.name}, width {model.width:g}, T = {encoding.T}, {encoding.name} encoding",
        "neuron": f"LIF, tau {neuron.tau:g}, threshold {neuron.v_threshold:g}, {neuron.reset} reset",
        "surrogate": neuron.surrogate,
        "training": recipe.method,
    }
