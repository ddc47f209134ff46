"""Measure how many spikes float16, int8 and float8 flip in trained networks, also under other choices of the export.

Networks are converted to every precision in memory, and their spikes on test images are compared with float32's.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.diagnostics.spike_flips import SpikeFlips, compare_spikes
from mpdsgr_deploy.experiments.flip_records import KEY, FlipRecord, LayerFlips, PrecisionFlips, by_network
from mpdsgr_deploy.experiments.record_files import RECORDS, put_record
from mpdsgr_deploy.experiments.table_run import CHECKPOINT, Run, trained
from mpdsgr_deploy.exporting.graph import constant, data, initializer, insert
from mpdsgr_deploy.exporting.onnx_writer import to_graph
from mpdsgr_deploy.exporting.precision import FORMATS, convert, plan, products, rounded_weights
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.trained_networks import load_network


def measure_flips(runs: Iterable[Run], folder: Path, images: int) -> None:
    """Measure networks on the first `images` test images, and write a record of each into `folder`.

    Networks that have a record are left out, and networks that are missing are trained first.
    """
    measured = by_network(folder)
    for run in runs:
        if (run.name, run.row, run.recipe.training.seed) not in measured:
            log.info("flips of %s", run)
            put_record(folder / RECORDS, flips_of(run, images), KEY)


def variants(network: ir.Model, model: SpikingNet) -> dict[str, onnx.ModelProto]:
    """Return the variants to compare with a float32 network, by name.

    They are every precision with float32 and with float16 neurons, and int8 with its first or its last product in
    float16 or int8, which export keeps in float32.
    """
    graphs = {}
    for precision in ("fp16", "int8", "fp8"):
        for neurons in ("fp32", "fp16"):
            graphs[f"{precision}, neurons {neurons}"] = convert(network, plan(network, precision), neurons)
    layers = plan(network, "int8")
    first, *_, last = layers
    mean, std = model.normalize.mean, model.normalize.std
    largest = float((mean.maximum(1 - mean) / std).max())  # largest absolute value of a normalised pixel
    for place, layer, step in (
        ("first", first, largest / FORMATS["int8"].largest),
        # mean spikes, pooled at most once, are multiples of this scale, so nothing is rounded
        ("last", last, 1 / (4 * model.T)),
    ):
        graphs[f"{place} product fp16"] = convert(network, {**layers, layer: "fp16"})
        graphs[f"{place} product int8"] = in_int8(convert(network, layers), layer, step)
    return {name: ir.to_proto(variant) for name, variant in graphs.items()}


def in_int8(network: ir.Model, layer: str, step: float) -> ir.Model:
    """Round a layer's weights to int8 and its input to multiples of `step`, in place; return `network`."""
    node = products(network)[layer]
    scale = initializer(node, f"{layer}/step", np.array(step, np.float32))
    zero = initializer(node, f"{layer}/zero", np.array(0, np.int8))
    (rounded,) = insert(node, "QuantizeLinear", [data(node), scale, zero])
    node.replace_input_with(0, insert(node, "DequantizeLinear", [rounded, scale, zero])[0])
    weights = constant(node.inputs[1])
    assert weights is not None
    values, scales = rounded_weights(weights, FORMATS["int8"], np.dtype(np.float32))
    approximate = values.astype(np.float32) * scales.reshape(-1, *[1] * (weights.ndim - 1))
    node.replace_input_with(1, initializer(node, f"{layer}/rounded", approximate))
    return network


def flips_of(run: Run, images: int) -> FlipRecord:
    """Compare every variant of a run's network with float32 on the first `images` test images.

    The network is trained first if it is missing. Raises InputError as training and export do.
    """
    checkpoint, model = load_network(trained(run))
    recipe = checkpoint.recipe
    test = load_test(run.local_recipe.data)[:images]
    network = to_graph(simplify(model), checkpoint.shape)
    compared = compare_spikes(
        ir.to_proto(network), variants(network, model), test.unit(), v_threshold=recipe.neuron.v_threshold
    )
    return FlipRecord(
        table=run.name,
        row=run.row,
        seed=recipe.training.seed,
        checkpoint=CHECKPOINT,
        method=recipe.method,
        defence=recipe.defence,
        network=f"{recipe.model.name}, width {recipe.model.width:g}, T = {recipe.encoding.T}",
        weights_sha256=checkpoint.weights_sha256,
        data=recipe.data.name,
        n=len(test),
        variants={flips.precision: summary(flips) for flips in compared},
        provenance=provenance(),
    )


def summary(flips: SpikeFlips) -> PrecisionFlips:
    """Return a variant's flips as a record, averaged over the steps of each layer."""
    fields = [name for name in LayerFlips.model_fields if name != "predicted"]
    layers = {}
    for layer in flips.layers():
        predicted = [step.density * step.fresh_moved for step in flips.steps if step.layer == layer]
        means: dict[str, Any] = {name: flips.mean(name, layer) for name in fields}
        layers[layer] = LayerFlips(**means, predicted=float(np.mean(predicted)))
    return PrecisionFlips(
        labels_changed=flips.labels_changed, unflipped=flips.unflipped, logits_moved=flips.logits_moved, layers=layers
    )
