"""How many spikes float16, int8 and float8 flip in trained networks, and what the export's defaults cost beside others.

    python train/flips.py runs/digits/*-seed* --root data

Takes training runs, exports each in every precision without writing a bundle, compares spikes on test images, and
writes one JSON file a network and the page. Networks that are measured already are skipped.
"""

import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
from flips_page import RESULTS, FlipResult, LayerFlips, VariantFlips, write_page

from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.diagnostics.flips import Flips, compare_spikes
from mpdsgr_deploy.errors import InputError, MpdsgrError
from mpdsgr_deploy.exporting.graph import constant, data, initializer, insert
from mpdsgr_deploy.exporting.onnx_writer import to_graph
from mpdsgr_deploy.exporting.precision import FORMATS, convert, plan, products, rounded_weights
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.networks import load_network
from mpdsgr_deploy.progress import log, show_progress
from mpdsgr_deploy.provenance import provenance

RUN = re.compile(r"(?P<row>.+)-seed(?P<seed>\d+)-[0-9a-f]{8}")


def variants(network: ir.Model, model: SpikingNet) -> dict[str, onnx.ModelProto]:
    """Every precision with float32 and with float16 neurons, and int8 with another first or last product."""
    found = {}
    for precision in ("fp16", "int8", "fp8"):
        for neurons in ("fp32", "fp16"):
            found[f"{precision}, neurons {neurons}"] = convert(network, plan(network, precision), neurons)
    layers = plan(network, "int8")
    first, *_, last = layers
    mean, std = model.normalize.mean, model.normalize.std
    reach = float((mean.maximum(1 - mean) / std).max())  # of the normalised image
    for place, layer, step in (
        ("first", first, reach / FORMATS["int8"].largest),
        ("last", last, 1 / (4 * model.T)),  # mean spikes, pooled once at most, are multiples of it: nothing is rounded
    ):
        found[f"{place} product fp16"] = convert(network, {**layers, layer: "fp16"})
        found[f"{place} product int8"] = in_int8(convert(network, layers), layer, step)
    return {name: ir.to_proto(variant) for name, variant in found.items()}


def in_int8(network: ir.Model, layer: str, step: float) -> ir.Model:
    """`network`, changed in place, with a layer's weights rounded to int8 and its input to multiples of `step`."""
    node = products(network)[layer]
    scale = initializer(node, f"{layer}/step", np.float32(step))
    zero = initializer(node, f"{layer}/zero", np.int8(0))
    (rounded,) = insert(node, "QuantizeLinear", [data(node), scale, zero])
    node.replace_input_with(0, insert(node, "DequantizeLinear", [rounded, scale, zero])[0])
    weights = constant(node.inputs[1])
    assert weights is not None
    values, scales = rounded_weights(weights, FORMATS["int8"], np.dtype(np.float32))
    approximate = values.astype(np.float32) * scales.reshape(-1, *[1] * (weights.ndim - 1))
    node.replace_input_with(1, initializer(node, f"{layer}/rounded", approximate))
    return network


def measure(run: Path, *, root: str, images: int) -> FlipResult:
    """A run's last network in every variant, on the first `images` test images. Raises InputError as its parts."""
    name = RUN.fullmatch(run.name)
    if name is None:
        raise InputError(f"{run} is not called ROW-seedN-HASH, as `train/reproduce.py` calls its runs")
    checkpoint, model = load_network(run / "last")
    recipe = checkpoint.recipe
    test = load_test(recipe.data.at(root))[:images]
    network = to_graph(simplify(model), checkpoint.shape)
    found = compare_spikes(
        ir.to_proto(network), variants(network, model), test.unit(), v_threshold=recipe.neuron.v_threshold
    )
    return FlipResult(
        table=run.parent.name,
        row=name["row"],
        seed=int(name["seed"]),
        method=recipe.method,
        network=f"{recipe.model.name}, width {recipe.model.width:g}, T = {recipe.encoding.T}",
        weights_sha256=checkpoint.weights_sha256,
        data=recipe.data.name,
        n=len(test),
        variants={flips.precision: summary(flips) for flips in found},
        provenance=provenance(),
    )


def summary(flips: Flips) -> VariantFlips:
    """A variant's flips with the steps of each layer averaged."""
    fields = [name for name in LayerFlips.model_fields if name != "predicted"]
    layers = {}
    for layer in flips.layers():
        predicted = [step.density * step.fresh_moved for step in flips.steps if step.layer == layer]
        means: dict[str, Any] = {name: flips.mean(name, layer) for name in fields}
        layers[layer] = LayerFlips(**means, predicted=float(np.mean(predicted)))
    return VariantFlips(
        labels_changed=flips.labels_changed, unflipped=flips.unflipped, logits_moved=flips.logits_moved, layers=layers
    )


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--root", default="data", show_default=True, help="Where the data sets lie.")
@click.option("--images", type=click.IntRange(1), default=500, show_default=True, help="Test images a network.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the results and the page.")
def main(runs: tuple[Path, ...], root: str, images: int, out: Path) -> None:
    """Measure the networks of RUNS, directories that train/reproduce.py made, and render the page of all there are."""
    show_progress()
    out.mkdir(parents=True, exist_ok=True)
    try:
        for run in runs:
            file = out / f"{run.parent.name}-{run.name[:-9]}.json"  # without the hash
            if not file.exists():
                result = measure(run, root=root, images=images)
                write_atomic(file, (result.model_dump_json(indent=1) + "\n").encode())
                log.info("%s", file)
        log.info("%s", write_page(out))
    except MpdsgrError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
