"""One row of a table with one seed: train its network, evaluate it, write the results file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from result import Membrane, Result, result_path
from sensitivity import sensitivity
from table import Artefact

from mpdsgr_deploy.bundle import MANIFEST, open_bundle
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.diagnostics.measure import measure as membranes
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.networks import load_network
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime.session import CUDA
from mpdsgr_deploy.training import train
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.evaluate import Evaluation, evaluate
from mpdsgr_deploy.validation.report import Report

LOOKED_AT = 500  # at most so many of the test images, for what explains the accuracies
EVALUATION = {"attack", "validation"}  # sections of a recipe that training does not depend on


def run_directory(runs: Path, table: str, row: str, recipe: Recipe) -> Path:
    """Where a row is trained. Another recipe trains elsewhere; one that is only attacked otherwise is the same run."""
    content = recipe.model_dump(mode="json", exclude=EVALUATION)
    return runs / table / f"{row}-seed{recipe.training.seed}-{digest(content)}"


def trained(table: str, row: str, recipe: Recipe, *, runs: Path, root: str) -> Path:
    """The run directory of a row's network, trained to the end."""
    run = run_directory(runs, table, row, recipe)
    train(recipe.model_copy(update={"data": recipe.data.at(root)}), run, resume=True)
    return run


def digest(content: Any) -> str:
    """A short name for a JSON-ready value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def measure(
    table: str,
    row: str,
    recipe: Recipe,
    *,
    artefact: Artefact | None,
    tier: str | None,
    transfer: Path | None,
    runs: Path,
    root: str,
    folder: Path,
) -> Result:
    """Train (or continue, or find trained) a row's network, evaluate it, and write its results file.

    Evaluated is the last epoch's network, at the end of the schedule: which epoch scores best on few validation images
    is chance, and rows that stopped at different ages would differ in more than their method. With `artefact` it is
    exported, and its first precision's accuracies are the row's; without, torch's network is attacked as `tier` says,
    and with the images that fool the network of the run `transfer`. Raises InputError as training, export and
    evaluation do.
    """
    run = trained(table, row, recipe, runs=runs, root=root)
    last = run / "last"
    if artefact is None:  # the table's attack, whatever it asked for when this trained
        sender = None if transfer is None else transfer / "last"
        reports, evaluation = {}, evaluate(last, recipe=recipe, root=root, transfer=sender, tier=tier)
    else:
        reports = deployed(run, recipe, artefact, root)
        evaluation = Evaluation.of(reports[artefact.precisions[0]])
    images = load_test(recipe.data.at(root))
    checkpoint, model = load_network(last)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    few = images[: min(evaluation.rows[0].n, LOOKED_AT)]
    history = checkpoint.history
    result = Result(
        table=table,
        row=row,
        seed=recipe.training.seed,
        recipe=recipe,
        epoch=checkpoint.epoch,
        seconds=round(sum(entry["seconds"] for entry in history), 1),
        curve=[{key: value for key, value in entry.items() if key != "layers"} for entry in history],
        layers=history[-1]["layers"],
        membranes=potentials(model, few, recipe),
        tier=tier,
        evaluation=evaluation,
        artefacts=reports,
        sensitivity=sensitivity(model, few, recipe),
        provenance=checkpoint.provenance,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(result_path(folder, row, result.seed), (result.model_dump_json(indent=1) + "\n").encode())
    return result


def deployed(run: Path, recipe: Recipe, artefact: Artefact, root: str) -> dict[str, Report]:
    """Export a run's network and attack every precision of it, through its own attack graph; without the pictures.

    On a GPU where onnxruntime has one. What is finished is kept beside the run, what was interrupted continues.
    """
    backend = "onnxruntime-cuda" if CUDA in onnxruntime.get_available_providers() else "onnxruntime-cpu"
    asked = [recipe.model_dump(mode="json", include={*EVALUATION, "gate"}), artefact.model_dump(mode="json"), backend]
    folder = run / f"deployed-{digest(asked)}"
    bundle = folder / "bundle"
    if not (bundle / MANIFEST).exists():
        names = [name for name in artefact.precisions if name != "fp32"]
        last, limit = run / "last", recipe.validation.limit
        export(last, bundle, recipe=recipe, precisions=names, root=root, limit=limit, tier=artefact.tier)
    reports = {}
    for precision in artefact.precisions:
        kept = folder / f"{precision}.json"
        if not kept.exists():
            log.info("%s: %s on %s", run.name, precision, backend)
            target = Target(open_bundle(bundle), backend, precision)
            report = validate(target, gate=artefact.gate, report_dir=folder / precision)
            slim = report.model_copy(update={"examples": [], "bundle": run.name})
            write_atomic(kept, slim.model_dump_json().encode())
        reports[precision] = Report.model_validate_json(kept.read_bytes())
    return reports


def potentials(model: SpikingNet, images: Images, recipe: Recipe) -> list[Membrane]:
    """Where every layer's membrane potentials lie, over all steps and channels."""
    noise = torch.Generator().manual_seed(recipe.validation.seed)
    device = next(model.parameters()).device
    x = torch.from_numpy(images.unit()).to(device)
    found = []
    for layer in membranes(model, x, batch_size=recipe.validation.batch_size, noise=noise):
        counts = layer.counts.sum((0, 1)).double()
        share = (counts / (layer.size * layer.counts.shape[0] * layer.counts.shape[1])).numpy()
        filled = np.flatnonzero(share)
        used = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0)
        edges = layer.edges.double().numpy() - layer.v_threshold
        found.append(
            Membrane(
                layer=layer.layer,
                half_width=layer.half_width,
                start=float(edges[used.start or 0]),
                width=float(edges[1] - edges[0]),
                share=[round(float(value), 6) for value in share[used]],
            )
        )
    return found
