"""Measure the robustness of a checkpoint's torch network, without an export, for tables of trained networks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpdsgr_deploy.attacks.condition import CLEAN, TRANSFER, WORST, Source
from mpdsgr_deploy.attacks.resumable_run import classes_of
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.attacks.suite_measurement import measure
from mpdsgr_deploy.attacks.tiers import TIERS, TierEntry, recipe_entries
from mpdsgr_deploy.checkpoint import find_checkpoint
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.validation.evidence import of_attacks
from mpdsgr_deploy.validation.health.check_registry import Check, Evidence, run_checks
from mpdsgr_deploy.validation.rows import Row
from mpdsgr_deploy.validation.target import other_network


class Evaluation(NamedTuple):
    """The verdicts under every condition, and under `worst`: correct under all conditions within eps.

    health: the checks that need no exported network; if one failed, the accuracies prove nothing.
    """

    images: str
    seed: int
    rows: list[Row]
    health: list[Check]
    provenance: dict[str, Any]


def evaluate(
    checkpoint_dir: Path,
    recipe: Recipe,
    *,
    transfer: Path | None = None,
    tier: str | None = None,
    also: Sequence[TierEntry] = (),
) -> Evaluation:
    """Attack the torch network of a checkpoint, or of a training run's last epoch.

    recipe: states attacks and test images, in place of the checkpoint's.
    transfer: checkpoint of another network, whose attacked images are tried as well.
    tier: the attacks are those of this tier, in place of those that the recipe names. also: further attacks.

    Raises InputError for missing data, a damaged checkpoint, and a `transfer` made for other images.
    """
    checkpoint, model = load_network(find_checkpoint(checkpoint_dir))
    seed, size = recipe.validation.seed, recipe.validation.batch_size
    images = load_test(recipe.data)[: recipe.validation.limit]
    images.require_kind(recipe.data.name, checkpoint.shape, checkpoint.labels)
    network = Source(TorchNetwork(TorchModel(model, checkpoint.shape, seed)), trained_surrogate(checkpoint.recipe))
    others = {} if transfer is None else {TRANSFER: other_network(transfer, images.shape, images.labels)}
    entries = recipe_entries(recipe.attack) if tier is None else TIERS[tier].entries
    suite = Suite.of(network, (*entries, *also), recipe.attack, seed=seed, transfer=others)
    x = images.unit()
    clean = classes_of(predict(suite.network, x, size, CLEAN))
    measurement = measure(suite, x, images.classes, clean, batch_size=size)
    settings = {condition.name: condition.settings for condition in suite.conditions}
    settings |= {CLEAN: "test images as they are", WORST: "correct under every condition within eps"}
    rows = [Row.of(name, settings[name], correct) for name, correct in measurement.verdicts.items()]
    rule = name_sample(len(images), recipe.data.name)
    evidence = of_attacks(Evidence(rule=rule, n=len(images)), measurement, suite.conditions, suite.source.trained)
    return Evaluation(rule, seed, rows, run_checks(evidence), provenance())
