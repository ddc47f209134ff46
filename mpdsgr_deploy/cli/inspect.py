"""mpdsgr inspect"""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import click

from mpdsgr_deploy.bundle import MANIFEST, open_bundle
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.recipe import Recipe


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def command(path: Path, as_json: bool) -> None:
    """Show what PATH holds: a bundle, a training run or a checkpoint. Verifies every hash on the way.

    \b
    Example:
      mpdsgr inspect bundles/digits
    """
    facts, layers = bundle_facts(path) if (path / MANIFEST).exists() else checkpoint_facts(path)
    if as_json:
        print_json({**facts, "layers": layers})
        return
    print_table(("", str(path)), [(name, value) for name, value in facts.items()])
    if layers:
        columns = list(layers[0])
        rows = [[f"{v:.3f}" if isinstance(v, float) else v or "" for v in layer.values()] for layer in layers]
        print_table(columns, rows, "membrane statistics on the last epoch's first validation batch")


def bundle_facts(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a verified bundle's manifest and ONNX files say."""
    import onnx

    bundle = open_bundle(path)
    manifest, recipe = bundle.manifest, bundle.manifest.recipe
    facts: dict[str, Any] = {
        "kind": "bundle, every hash verified",
        "input": f"{manifest.input_name}: float32 [B, {', '.join(map(str, manifest.input_shape))}] in [0, 1]",
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


def checkpoint_facts(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a verified checkpoint says of itself."""
    checkpoint = load_checkpoint(find_checkpoint(path))
    facts = {
        "kind": "checkpoint, hash verified",
        "data": checkpoint.recipe.data.name,
        **describe(checkpoint.recipe),
        "epoch": f"{checkpoint.epoch} of {checkpoint.recipe.training.epochs}",
        **{name: f"{value:.4f}" for name, value in checkpoint.metrics.items()},
        "created": checkpoint.provenance.get("created", "unknown"),
    }
    layers: list[dict[str, Any]] = checkpoint.history[-1]["layers"] if checkpoint.history else []
    return facts, layers


def describe(recipe: Recipe) -> dict[str, Any]:
    """The network and its training in a few lines."""
    model, neuron, encoding = recipe.model, recipe.neuron, recipe.encoding
    return {
        "model": f"{model.name}, width {model.width:g}, T = {encoding.T}, {encoding.name} encoding",
        "neuron": f"LIF, tau {neuron.tau:g}, threshold {neuron.v_threshold:g}, {neuron.reset} reset",
        "surrogate": neuron.surrogate,
        "training": recipe.method,
    }
