"""Facts about a bundle or a checkpoint, read from its verified files without torch."""

from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import onnx

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.diagnostics.layer_statistics import LayerStatistics
from mpdsgr_deploy.diagnostics.operation_counts import macs, parameters
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import Promise
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime
from mpdsgr_deploy.runtime.firing import spike_names, with_firing_rates
from mpdsgr_deploy.surrogates import trained_surrogate


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Return what `mpdsgr inspect` shows of a bundle, by label: its manifest, ONNX files, and firing rates.

    Firing rates are measured on the golden inputs with onnxruntime; where that fails, the value is the reason.
    """
    manifest = bundle.manifest
    facts: dict[str, Any] = {
        "kind": "bundle, every hash verified",
        "input": f"{manifest.input_name}: float32 [B, {', '.join(map(str, manifest.input_shape))}] in [0, 1]",
        **{f"noise {x.name}": f"{x.kind}, float32 [B, {', '.join(map(str, x.shape))}]" for x in manifest.noise},
        "labels": ", ".join(manifest.labels[:10]) + (" ..." if len(manifest.labels) > 10 else ""),
        **(
            describe(manifest.recipe, manifest.time_steps)
            if manifest.origin == "trained"
            else described_elsewhere(bundle)
        ),
        "checkpoint": manifest.provenance.get("checkpoint", "not recorded"),
    }
    if manifest.reference is not None:
        facts["promised"] = promised(manifest.reference, manifest.recipe.attack.eps)
    for precision in manifest.variants:
        lines = variant_facts(bundle, precision)
        facts.update({f"{precision} {name}": value for name, value in lines.items()})
    return facts


def variant_facts(bundle: Bundle, precision: str) -> dict[str, Any]:
    """Return the facts about one precision of a bundle, by label; see `bundle_facts`."""
    variant, file = bundle.manifest.variants[precision], bundle.variant(precision)
    network = onnx.load(file)
    products = macs(network, bundle.manifest.recipe.encoding.T)
    nodes = Counter(node.op_type for node in network.graph.node)
    facts: dict[str, Any] = {
        "parameters": parameters(network),
        "MACs an image": products.exported,
        "MACs an image, every product at every step": products.naive,
        "bytes": file.stat().st_size,
        "nodes": ", ".join(f"{count} {op}" for op, count in nodes.most_common()),
    }
    if variant.layers:
        facts["layers"] = spans(variant.layers)
    noise = NoiseSource(bundle.manifest.noise, bundle.manifest.recipe.validation.seed)
    try:
        steps = spike_names(network, file)
        with OnnxRuntime(with_firing_rates(network, steps), noise=noise, source=file) as observable:
            _, rates = observable.answers(bundle.golden()[0])
        facts["firing rates, golden inputs"] = ", ".join(
            f"{layer} {rate:.3f}" for layer, rate in zip(steps, rates.mean(0), strict=True)
        )
    except InputError as error:
        facts["firing rates, golden inputs"] = f"not measured: {error}"
    if variant.accuracy:
        accuracy = variant.accuracy
        facts["at export"] = f"{accuracy.correct} of {accuracy.n} {accuracy.data} test images correct"
    if variant.attacked:
        facts["attacked, at export"] = f"{variant.attacked.correct} of {variant.attacked.n} correct under PGD"
    return facts


def promised(promise: Promise, eps: float) -> str:
    """Describe the accuracies of the reference network, measured at export, and the attacks that they are under."""
    accuracies = ", ".join(f"{name} {100 * correct / promise.n:.1f} %" for name, correct in promise.correct.items())
    images = f"on {name_sample(promise.n, promise.data)}"
    return f"{images}, tier {promise.tier}, eps {eps * 255:.3g}/255: {accuracies}"


def spans(layers: Mapping[str, str]) -> str:
    """Describe layers' precisions, with neighbours of equal precision joined: `conv1 fp32, conv2 to conv5 int8`."""
    parts = []
    for precision, group in groupby(layers, layers.__getitem__):
        first, *others = group
        parts.append(f"{first} to {others[-1]} {precision}" if others else f"{first} {precision}")
    return ", ".join(parts)


def checkpoint_facts(path: Path) -> tuple[dict[str, Any], list[LayerStatistics]]:
    """Return facts about a checkpoint, or a training run's last one, and the layer statistics of its last epoch.

    Raises InputError as `find_checkpoint` and `load_checkpoint` do.
    """
    checkpoint = load_checkpoint(find_checkpoint(path))
    facts = {
        "kind": "checkpoint, hash verified",
        "data": checkpoint.recipe.data.name,
        **describe(checkpoint.recipe, f"T = {checkpoint.recipe.encoding.T}"),
        "checkpoint": checkpoint.origin,
        **{name: f"{value:.4f}" for name, value in checkpoint.metrics.items()},
        "created": checkpoint.provenance.get("created", "unknown"),
    }
    layers = checkpoint.history[-1]["layers"] if checkpoint.history else []
    return facts, [LayerStatistics(**layer) for layer in layers]


def described_elsewhere(bundle: Bundle) -> dict[str, Any]:
    """Return what was recognised in a network that this package did not train, by label."""
    manifest = bundle.manifest
    adopted = manifest.provenance["adopted"]
    layers = ", ".join(f"{name} x {steps}" for name, steps in adopted["layers"].items()) or "none: no spiking network"
    preprocessing = {key: value for key, value in adopted["preprocessing"].items() if value}
    return {
        "model": manifest.recipe.model.name,
        "spiking layers x time steps": layers,
        "attacked through": trained_surrogate(manifest.recipe),
        "in front of its nodes": "nothing"
        if adopted["unchanged"]
        else ", ".join(f"{k} {v}" for k, v in preprocessing.items()),
    }


def describe(recipe: Recipe, time_steps: str) -> dict[str, Any]:
    """Return facts about the network and training of a recipe, by label."""
    model, neuron = recipe.model, recipe.neuron
    return {
        "model": f"{model.name}, width {model.width:g}, {time_steps}, {recipe.encoding.name} encoding",
        "neuron": f"LIF, tau {neuron.tau:g}, threshold {neuron.v_threshold:g}, {neuron.reset} reset",
        "surrogate": neuron.surrogate,
        "training": recipe.method,
    }
