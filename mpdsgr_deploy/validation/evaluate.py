"""Robustness of a checkpoint's torch network, without exporting it: what tables of trained networks are made of."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint, load_model, load_network
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.validation import health
from mpdsgr_deploy.validation.conditions import conditions, torch_attackers
from mpdsgr_deploy.validation.health import Check
from mpdsgr_deploy.validation.rows import Score


class EvaluatedRow(BaseModel):
    """One condition and the network's verdicts under it."""

    name: str
    settings: str
    n: int
    score: Score


class Evaluation(BaseModel):
    """Every condition in turn, and `worst`: right under all of those within eps.

    `health` has the checks that need no artefact; where one failed the accuracies prove nothing.
    """

    images: str
    seed: int
    rows: list[EvaluatedRow]
    health: list[Check] = []
    provenance: dict[str, Any]


def evaluate(
    checkpoint_dir: Path,
    *,
    recipe: Recipe | None = None,
    root: str | None = None,
    limit: int | None = None,
    transfer: Path | None = None,
) -> Evaluation:
    """Attack the network of a checkpoint (or of a training run: its best one) as its recipe says.

    recipe: attacks and test images of another one instead. root and limit override the recipe's test images; transfer
    is the checkpoint of another network whose attacked images are tried as well. Raises InputError for missing data or
    a damaged checkpoint.
    """
    checkpoint, network = load_network(find_checkpoint(checkpoint_dir))
    recipe = recipe or checkpoint.recipe
    data = recipe.data.at(root)
    images = load_test(data)[: limit or recipe.validation.limit]
    images.require_kind(data.name, checkpoint.shape, checkpoint.labels)
    x, y = images.unit(), images.classes
    model = TorchModel(network, checkpoint.shape, recipe.validation.seed)
    other = other_network(transfer, images)
    attackers = torch_attackers(model, recipe.attack, other)
    monitor = health.GradientMonitor(attackers.trained)
    rows: list[EvaluatedRow] = []
    faults: list[str] = []
    verdicts: dict[str, NDArray[np.bool_]] = {}  # of the conditions within eps
    for condition in conditions(
        attackers._replace(trained=monitor),
        x,
        y,
        recipe.attack,
        batch_size=recipe.validation.batch_size,
        seed=recipe.validation.seed,
    ):
        right = predict(model, condition.images, recipe.validation.batch_size).argmax(1) == y
        if condition.eps is not None:
            verdicts[condition.name] = right
        faults += health.budget_faults(x, condition)
        rows.append(EvaluatedRow(name=condition.name, settings=condition.settings, n=len(y), score=Score.of(right)))
        log.info("%-22s  %5.1f %%", condition.name, 100 * right.mean())
    worst, everything = np.logical_and.reduce(list(verdicts.values())), "right under every condition within eps"
    rows.append(EvaluatedRow(name="worst", settings=everything, n=len(y), score=Score.of(worst)))
    rule = f"the first {len(y)} test images of {data.name}"
    return Evaluation(
        images=rule,
        seed=recipe.validation.seed,
        rows=rows,
        health=health.attack_checks(faults, rule, verdicts, monitor, len(y)),
        provenance=provenance(),
    )


def other_network(checkpoint_dir: Path | None, images: Images) -> TorchModel | None:
    """The network to transfer attacks from, if any. Raises InputError if it was not made for such images."""
    if checkpoint_dir is None:
        return None
    source = find_checkpoint(checkpoint_dir)
    found = load_checkpoint(source)
    if (found.shape, found.labels) != (images.shape, images.labels):
        raise InputError(f"{checkpoint_dir} was not trained on images like those under attack; take another")
    network = load_model(source / found.weights, found.recipe, found.shape, len(found.labels))
    return TorchModel(network, found.shape, found.recipe.validation.seed)
