"""One row of a table with one seed: train its network, evaluate it, write the results file."""

import hashlib
import json
from pathlib import Path

import torch
from result import Result, result_path
from sensitivity import sensitivity

from mpdsgr_deploy.checkpoint import load_network
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.training import train
from mpdsgr_deploy.validation.evaluate import evaluate

SENSITIVITY_IMAGES = 500  # at most so many of the test images


def run_directory(runs: Path, table: str, row: str, recipe: Recipe) -> Path:
    """Where a row is trained. Another recipe trains elsewhere; one that is only attacked otherwise is the same run."""
    content = json.dumps(recipe.model_dump(mode="json", exclude={"attack", "validation"}), sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return runs / table / f"{row}-seed{recipe.training.seed}-{digest}"


def measure(table: str, row: str, recipe: Recipe, *, runs: Path, root: str, folder: Path) -> Result:
    """Train (or continue, or find trained) a row's network, evaluate it, and write its results file.

    Evaluated is the last epoch's network, at the end of the schedule: which epoch scores best on few validation images
    is chance, and rows that stopped at different ages would differ in more than their method. Raises
    InputError as training and evaluation do.
    """
    run = run_directory(runs, table, row, recipe)
    train(recipe.model_copy(update={"data": recipe.data.at(root)}), run, resume=True)
    last = run / "last"
    evaluation = evaluate(last, recipe=recipe, root=root)  # the table's attack, whatever it asked for when this trained
    images = load_test(recipe.data.at(root))
    checkpoint, model = load_network(last)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
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
        evaluation=evaluation,
        sensitivity=sensitivity(model, images[: min(evaluation.rows[0].n, SENSITIVITY_IMAGES)], recipe),
        provenance=checkpoint.provenance,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(result_path(folder, row, result.seed), (result.model_dump_json(indent=1) + "\n").encode())
    return result
