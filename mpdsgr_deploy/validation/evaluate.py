"""Measure the robustness of a checkpoint's torch network, without an export, for tables of trained networks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mpdsgr_deploy.attacks.condition import CLEAN, TRANSFER, WORST, Source
from mpdsgr_deploy.attacks.resumable_run import classes_of
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.attacks.suite_measurement import measure
from mpdsgr_deploy.attacks.tiers import TIERS, TierEntry, recipe_entries
from mpdsgr_deploy.checkpoint import find_checkpoint
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.validation.evidence import of_attacks
from mpdsgr_deploy.validation.health.check_registry import Check, Evidence, run_checks
from mpdsgr_deploy.validation.rows import Score
from mpdsgr_deploy.validation.target import other_network


class EvaluatedRow(BaseModel):
    """One condition, and the network's verdicts on n images under it."""

    name: str
    settings: str
    n: int
    score: Score


class Evaluation(BaseModel):
    """The verdicts under every condition, and under `worst`: correct under all conditions within eps.

    health: the checks that need no exported network; if one failed, the accuracies prove nothing.
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
    tier: str | None = None,
    also: Sequence[TierEntry] = (),
) -> Evaluation:
    """Attack the torch network of a checkpoint, or of a training run's last epoch.

    recipe: states attacks and test images; default: the checkpoint's.
    root: directory of the data set, in place of the recipe's. limit: number of test images, in place of the recipe's.
    transfer: checkpoint of another network, whose attacked images are tried as well.
    tier: the attacks are those of this tier, in place of those that the recipe names. also: further attacks.

    Raises InputError for missing data, a damaged checkpoint, and a `transfer` made for other images.
    """
    checkpoint, model = load_network(find_checkpoint(checkpoint_dir))
    surrogate = trained_surrogate(checkpoint.recipe)
    recipe = recipe or checkpoint.recipe
    data = recipe.data.at(root)
    images = load_test(data)[: limit or recipe.validation.limit]
    images.require_kind(data.name, checkpoint.shape, checkpoint.labels)
    network = Source(TorchNetwork(TorchModel(model, checkpoint.shape, recipe.validation.seed)), surrogate)
    others = {} if transfer is None else {TRANSFER: other_network(transfer, images.shape, images.labels)}
    entries = recipe_entries(recipe.attack) if tier is None else TIERS[tier].entries
    suite = Suite.of(network, (*entries, *also), recipe.attack, seed=recipe.validation.seed, transfer=others)
    rule = name_sample(len(images), data.name)
    rows, health = _measured(suite, images, recipe.validation.batch_size, rule)
    return Evaluation(images=rule, seed=recipe.validation.seed, rows=rows, health=health, provenance=provenance())


def _measured(suite: Suite, images: Images, size: int, rule: str) -> tuple[list[EvaluatedRow], list[Check]]:
    x, y, n = images.unit(), images.classes, len(images)
    clean = classes_of(predict(suite.network, x, size, CLEAN))
    measurement = measure(suite, x, y, clean, batch_size=size)
    settings = {condition.name: condition.settings for condition in suite.conditions}
    named = {CLEAN: "test images as they are", **settings, WORST: "correct under every condition within eps"}
    rows = [
        EvaluatedRow(name=name, settings=named[name], n=n, score=Score.of(correct))
        for name, correct in measurement.verdicts.items()
    ]
    evidence = of_attacks(Evidence(rule=rule, n=n), measurement, suite.conditions, suite.source.trained)
    return rows, run_checks(evidence)
