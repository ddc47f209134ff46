"""How strong the attacks of a release are: their union against AutoAttack's standard version on the same torch network.

    mpdsgr train digits-reg --out runs/digits-reg
    python benchmarks/strength.py runs/digits-reg export/bundles/digits --root data --cache runs/strength

Takes training runs and bundles. What is finished is kept in the cache; networks in the results that are not measured
again stay there, with the version of the suite they met. Both meet the same images, and the same network judges what
they return. A gradient evaluation is one image through one
forward and backward pass, a query one image through a forward pass alone. AutoAttack (pyautoattack, of the `dev`
extra) attacks an image until it is broken, the attacks of a release each on their own, as a report shows them.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
import torch
from numpy.typing import NDArray
from research import opened
from research import sha256 as network_sha256

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.attacks.condition import CLEAN, Source
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.attacks.suite_measurement import measure as measure_suite
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.progress import show_progress
from mpdsgr_deploy.provenance import package_version, provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork
from mpdsgr_deploy.surrogates import trained_surrogate

NAME = "strength"
UNION, AUTOATTACK = "union", "AutoAttack standard"
BATCH = 200


@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--root", default="data", show_default=True, help="Where the data set lies.")
@click.option("--limit", type=click.IntRange(1), default=200, show_default=True, help="Test images.")
@click.option("--cache", type=click.Path(path_type=Path), default="runs/strength", show_default=True)
def run(runs: tuple[Path, ...], root: str, limit: int, cache: Path) -> dict[str, Any]:
    """Attack each network, of a run the best, both ways."""
    show_progress()
    cache.mkdir(parents=True, exist_ok=True)
    measured = dict(measure(run, root, limit, cache) for run in runs)
    return {"networks": {**harness.load(NAME)["networks"], **measured}, "pyautoattack": package_version("pyautoattack")}


def measure(path: Path, root: str, limit: int, cache: Path) -> tuple[str, dict[str, Any]]:
    """The network's name; images that survive each attack, and what it cost."""
    with opened(path, root, limit) as found:
        recipe, x, y, sha256 = found.recipe, found.images.unit(), found.images.classes, network_sha256(found.file)
        network = TorchModel(found.model, found.images.shape, recipe.validation.seed)
    if network.stochastic:
        raise click.ClickException("AutoAttack's standard version is not for networks that draw noise")
    clean = predict(network, x, BATCH).argmax(1)
    parts = {
        "release": lambda: release(network, recipe, x, y, clean),
        "autoattack": lambda: [autoattack(network, found.model, recipe, x, y)],
    }
    rows = [row(CLEAN, clean == y)]
    for part, attack in parts.items():
        file = cache / f"{found.name}-{sha256[:8]}-{len(y)}-{TIERS['release'].suite}-{part}.json"
        if not file.exists():
            write_atomic(file, json.dumps(attack()).encode())
        rows += json.loads(file.read_bytes())
    about = {"sha256": sha256, "suite": TIERS["release"].suite, "provenance": provenance()}
    return found.name, {**about, "recipe": recipe.model_dump(mode="json"), "n": len(y), "rows": rows}


def row(
    name: str, survived: NDArray[np.bool_], *, gradients: int = 0, queries: int = 0, seconds: float = 0.0
) -> dict[str, Any]:
    """One line of the result: images that survived, and costs an image."""
    n = len(survived)
    cost = {"gradients": gradients / n, "queries": queries / n, "seconds": round(seconds, 1)}
    return {"attack": name, "correct": int(survived.sum()), **cost}


def release(
    network: TorchModel, recipe: Recipe, x: NDArray[np.float32], y: NDArray[np.int64], clean: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """The attacks of a release within eps, one by one and together."""
    trained = trained_surrogate(recipe)
    source, entries = Source(TorchNetwork(network), trained), TIERS["release"].entries
    suite = Suite.of(source, entries, recipe.attack, seed=recipe.validation.seed)
    measurement = measure_suite(suite, x, y, clean, batch_size=BATCH)
    rows = [
        row(
            outcome.condition.name,
            outcome.correct,
            seconds=outcome.seconds,
            **{"queries" if outcome.condition.kind == "query" else "gradients": outcome.evaluations},
        )
        for outcome in measurement.outcomes
        if outcome.condition.eps is not None
    ]
    total = {key: sum(outcome[key] for outcome in rows) for key in ("gradients", "queries", "seconds")}
    return [*rows, {"attack": UNION, "correct": int(measurement.standing.sum()), **total}]


class Counting(torch.nn.Module):
    """A network that counts the images it answers: those that are differentiated, and all others."""

    def __init__(self, model: SpikingNet) -> None:
        super().__init__()
        self.model, self.gradients, self.queries = model, 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        differentiated = torch.is_grad_enabled() and x.requires_grad
        self.gradients += differentiated * len(x)
        self.queries += (not differentiated) * len(x)
        return self.model(x)


def autoattack(
    network: TorchModel, model: SpikingNet, recipe: Recipe, x: NDArray[np.float32], y: NDArray[np.int64]
) -> dict[str, Any]:
    """AutoAttack's standard version: APGD-CE, targeted APGD-DLR and FAB, Square with 5,000 queries."""
    import pyautoattack  # here: the rest of this file runs without it

    counting, begun = Counting(model), time.perf_counter()
    audit = pyautoattack.AutoAttack(
        counting, eps=recipe.attack.eps, seed=recipe.validation.seed, device=str(model.normalize.mean.device)
    )
    tensors = network.tensor(x), network.tensor(y)
    attacked = audit.run_standard_evaluation(*tensors, batch_size=BATCH)[0].cpu().numpy()
    seconds = time.perf_counter() - begun
    survived = predict(network, np.clip(attacked, 0, 1), BATCH).argmax(1) == y
    cost = {"gradients": counting.gradients, "queries": counting.queries}
    return row(AUTOATTACK, survived, **cost, seconds=seconds)


def render(result: dict[str, Any]) -> str:
    """The Markdown table, and what its networks are."""
    header = ["network", "attack", "right", "gradients per image", "queries per image", "s"]
    rows, notes = [], []
    for name, network in result["networks"].items():
        recipe, n = Recipe.model_validate(network["recipe"]), network["n"]
        for line in network["rows"]:
            right = f"{line['correct']} ({line['correct'] / n:.1%})"
            costs = (f"{line[cost]:.0f}" for cost in ("gradients", "queries", "seconds"))
            rows.append((name, line["attack"], right, *costs))
        notes.append(
            f"- {name}: {recipe.method}, {recipe.model.name}, width {recipe.model.width:g}, T = "
            f"{recipe.encoding.T}; eps {recipe.attack.eps:.4g}, the first {n} test images of {recipe.data.name}; suite "
            f"{network['suite']}; {harness.source(network)}"
        )
    notes.append(f"- pyautoattack {result['pyautoattack']}; seconds on a machine with other work.")
    return harness.table(header, rows, *notes)


main = harness.command("strength", run, render)

if __name__ == "__main__":
    main()
