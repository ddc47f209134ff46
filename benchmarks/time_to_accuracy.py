"""How long a training takes to reach an accuracy: fewer time steps first, beside all steps from the start, here and in
SpikingJelly.

    python benchmarks/time_to_accuracy.py --root data      writes results/time_to_accuracy.json and the page's table

The same network (VGG11's convolutions at a quarter of their width), images, augmentation, optimiser and schedule for
all; every training is a process of its own with one thread. Time is that of the processor, validation included. The
accuracy to reach is a point below what the plain recipe ends at, on validation images that no training sees; of the
staged recipe only epochs at the final number of steps count, since earlier ones are other networks.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
from workers import MALLOC, VERSIONS, python_of_peers

from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.recipe import Recipe, load_recipe
from mpdsgr_deploy.recipes import find_recipe

PLAIN, STAGED, PEER = "all steps from the start", "fewer steps first", "SpikingJelly, all steps from the start"
RECIPES = {PLAIN: "cifar10-vgg11-slim-reg", STAGED: "cifar10-vgg11-slim-fast"}
BELOW = 0.01  # of the plain recipe's last accuracy: what counts as reached


@click.option("--root", default="data", show_default=True, help="Where CIFAR-10 lies.")
@click.option("--images", default=8000, show_default=True, help="Training images.")
@click.option("--epochs", default=10, show_default=True, help="Of the trainings with all steps.")
@click.option("--stages", default=(10, 2, 1), show_default=True, nargs=3, type=int, help="Epochs at T = 1, 2 and 4.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Trainings of each.")
def run(root: str, images: int, epochs: int, stages: tuple[int, int, int], seeds: int) -> dict[str, Any]:
    """Train each with every seed."""
    shortened = [{"epochs": stages[0], "T": 1}, {"epochs": stages[1], "T": 2}]
    lengths = {PLAIN: {"epochs": epochs}, STAGED: {"epochs": sum(stages), "stages": shortened}}
    curves: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in (PLAIN, STAGED, PEER)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            recipes = {}
            for name, recipe in RECIPES.items():
                changes = [f"data.root={root}", f"data.train_images={images}", f"training.seed={seed}"]
                whole = load_recipe(find_recipe(recipe), [*changes, "training.pictures=0"]).model_dump()
                whole["training"] |= lengths[name]
                recipes[name] = Recipe.model_validate(whole)
                curves[name].append(ours(recipes[name], Path(folder) / f"{seed}-{recipe}"))
            curves[PEER].append(peer(recipes[PLAIN], Path(folder) / f"{seed}.npz"))
    setting = {"images": images, "stages": stages, "validation": len(load_training(recipes[PLAIN].data)[1])}
    return {"setting": setting, "curves": curves, "versions": VERSIONS}


def ours(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """Train in a process of its own: time steps, processor seconds so far and accuracy of each epoch."""
    file = out.with_suffix(".json")
    file.write_text(recipe.model_dump_json())
    train = "import sys, pathlib; from mpdsgr_deploy.recipe import Recipe; from mpdsgr_deploy.training import train; "
    train += "train(Recipe.model_validate_json(pathlib.Path(sys.argv[1]).read_bytes()), pathlib.Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", train, file, out], check=True, env=variables())
    curve, seconds = [], 0.0
    for epoch in load_checkpoint(find_checkpoint(out)).history:
        seconds += epoch["cpu_seconds"]
        curve.append({"T": epoch["T"], "cpu_seconds": seconds, "accuracy": epoch["validation_accuracy"]})
    return curve


def peer(recipe: Recipe, data: Path) -> list[dict[str, Any]]:
    """The same of SpikingJelly's network."""
    training, validation = load_training(recipe.data)
    np.savez(
        data,
        train=training.pixels,
        train_classes=training.classes,
        validation=validation.pixels,
        validation_classes=validation.classes,
    )
    config, T = recipe.training, recipe.encoding.T
    numbers = map(str, (recipe.model.width, T, config.epochs, config.batch_size, config.seed))
    script = harness.FOLDER / "peers" / "train.py"
    command = [python_of_peers(), script, data, *numbers]
    done = subprocess.run(command, check=True, env=variables(), stdout=subprocess.PIPE, text=True)
    return [{"T": T, **json.loads(line)} for line in done.stdout.splitlines()]


def variables() -> dict[str, str]:
    """One thread, and glibc told to keep freed pages."""
    return {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}


def reached(curve: list[dict[str, Any]], accuracy: float) -> float | None:
    """Processor seconds until a network of the final number of steps has that accuracy; None: never."""
    final = curve[-1]["T"]
    return next((e["cpu_seconds"] for e in curve if e["T"] == final and e["accuracy"] >= accuracy), None)


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    setting, curves, rows = result["setting"], result["curves"], []
    for seed, plain in enumerate(curves[PLAIN]):
        target = plain[-1]["accuracy"] - BELOW
        usual = reached(plain, target)
        for name, of_seeds in curves.items():
            curve = of_seeds[seed]
            seconds = reached(curve, target)
            ratio = "" if seconds is None or usual is None else f"{usual / seconds:.2f}"
            cells = [len(curve), f"{curve[-1]['cpu_seconds']:.0f}", f"{curve[-1]['accuracy']:.1%}", f"{target:.1%}"]
            rows.append([seed, name, *cells, "never" if seconds is None else f"{seconds:.0f}", ratio])
    header = ["seed", "training", "epochs", "s in all", "ends at", "to reach", "s to reach it", "times as fast"]
    T, peers = curves[PLAIN][0][-1]["T"], result["versions"]["spikingjelly"]
    at_first = " and ".join(f"{epochs} at T = {T}" for epochs, T in zip(setting["stages"], (1, 2), strict=False))
    return harness.table(
        header,
        rows,
        f"vgg11-slim at width 0.25, T = {T}, bf16, {setting['images']} images of CIFAR-10, accuracy on "
        f"{setting['validation']} others; fewer steps first: {at_first}, in batches of 128 with averaged weights. "
        f"Processor seconds of one thread. spikingjelly {peers}.",
        harness.source(result),
    )


main = harness.command("time_to_accuracy", run, render)

if __name__ == "__main__":
    main()
