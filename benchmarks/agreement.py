"""How often precisions agree with float32 on trained networks, on clean test images and on attacked ones.

    python benchmarks/agreement.py runs/clean/last runs/at/last --root data --attacked 10000

Published are the accurate network of export/bundles/cifar10-clean and an adversarial fine-tuning,
`cifar10-vgg11-slim-tune-at`. A network replaces that of the same method; the others stay in the results file.

The attack is the recipe's PGD on the torch network, so that every precision meets the same pixels; attacked are as many
of the first test images as `--attacked` says. OpenVINO runs int8 in int8 arithmetic; onnxruntime rounds float16 as the
file says.
"""

import tempfile
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import model_file
from mpdsgr_deploy.checkpoint import find_checkpoint
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import PRECISIONS, convert, plan
from mpdsgr_deploy.exporting.precision_loss import attack
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.progress import show_progress
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import OnnxRuntime, predict
from mpdsgr_deploy.runtime.openvino import OpenVino
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.validation.rows import VerdictFlips


@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--root", default="data", show_default=True, help="Where the data set lies.")
@click.option("--images", type=click.IntRange(1), default=10_000, show_default=True, help="Clean test images.")
@click.option("--attacked", type=click.IntRange(1), default=1000, show_default=True, help="Attacked test images.")
def run(runs: tuple[Path, ...], root: str, images: int, attacked: int) -> dict[str, Any]:
    """Compare the precisions of each run's best network."""
    show_progress()
    networks: dict[str, dict[str, Any]] = harness.load("agreement")["networks"]
    for run in runs:
        network = measure(run, root, images, attacked)
        networks[Recipe.model_validate(network["recipe"]).method] = network
    return {"networks": networks}


def measure(run: Path, root: str, images: int, attacked: int) -> dict[str, Any]:
    """Labels equal to float32's and paired verdicts, for each precision, on clean and on attacked images."""
    checkpoint, model = load_network(find_checkpoint(run))
    recipe = checkpoint.recipe
    test = load_test(recipe.data.at(root))[:images]
    network = TorchModel(model, checkpoint.shape, recipe.validation.seed)
    x = {"clean": test.unit(), "attacked": attack(network, recipe, test[:attacked])}
    graph = to_graph(simplify(model), checkpoint.shape)
    labels: dict[str, dict[str, NDArray[np.int64]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            path = Path(folder) / model_file(precision)
            save(convert(graph, plan(graph, precision)), path)
            backend = OnnxRuntime if precision == "fp16" else OpenVino
            with backend(path, noise=network.noise) as predictor:
                labels[precision] = {
                    kind: predict(predictor, pixels, what=f"{precision}, {kind}").argmax(1)
                    for kind, pixels in x.items()
                }
    return {
        "recipe": recipe.model_dump(mode="json"),
        "provenance": provenance(),
        "epoch": checkpoint.epoch,
        "attack": f"PGD, eps {recipe.attack.eps:.4g}, {recipe.attack.steps} steps of {recipe.attack.step:.4g}",
        "rows": [
            {"precision": precision, "images": name, **compare(labels["fp32"][name], classes[name], test.classes)}
            for name in x
            for precision, classes in labels.items()
        ],
    }


def compare(exact: NDArray[np.int64], rounded: NDArray[np.int64], classes: NDArray[np.int64]) -> dict[str, Any]:
    """Labels [N] of a precision beside those of float32, and the verdicts of both paired."""
    y = classes[: len(exact)]
    return {
        "n": len(rounded),
        "equal": int((exact == rounded).sum()),
        "correct": int((rounded == y).sum()),
        **VerdictFlips.of(exact == y, rounded == y).model_dump(),
    }


def render(result: dict[str, Any]) -> str:
    """The Markdown table, and what its networks are."""
    rows, notes = [], []
    for method, network in result["networks"].items():
        recipe = Recipe.model_validate(network["recipe"])
        for row in network["rows"]:
            n = row["n"]
            cells = [method, row["images"], row["precision"], n, f"{row['equal']} ({row['equal'] / n:.2%})"]
            cells += [f"{row['correct']} ({row['correct'] / n:.2%})", row["newly_wrong"], row["newly_right"]]
            rows.append([*cells, f"{row['p_value']:.2g}"])
        model, epoch = recipe.model, f"epoch {network['epoch']} of {recipe.training.epochs}"
        notes.append(
            f"- {method}: {model.name}, width {model.width:g}, T = {recipe.encoding.T}, on "
            f"{recipe.data.train_images or 'all'} images of {recipe.data.name}, {epoch}. {network['attack']}. "
            f"{harness.source(network)}"
        )
    header = ["network", "images", "precision", "n", "labels as in fp32", "correct", "newly wrong", "newly right"]
    return harness.table([*header, "McNemar's p"], rows, *notes)


main = harness.command("agreement", run, render)

if __name__ == "__main__":
    main()
