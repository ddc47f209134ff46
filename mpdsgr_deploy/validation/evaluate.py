"""Robustness of a checkpoint's torch network, without exporting it: what tables of trained networks are made of."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mpdsgr_deploy.attacks.run import outcomes
from mpdsgr_deploy.attacks.suite import CLEAN, SQUARE, STRONG, TRANSFER, WORST, Source, Suite
from mpdsgr_deploy.attacks.tiers import TIERS, recipe_entries
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.networks import load_model, load_network
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.validation import health
from mpdsgr_deploy.validation.health import Check
from mpdsgr_deploy.validation.images import require_alike
from mpdsgr_deploy.validation.report import Report
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

    @classmethod
    def of(cls, report: Report) -> "Evaluation":
        """What a report says of an exported network."""
        rows = [EvaluatedRow(name=r.name, settings=r.settings, n=r.n, score=r.artefact) for r in report.rows]
        network = f"the {report.precision} network on {report.backend}"
        made = {**report.provenance, "network": network}
        return cls(images=report.images, seed=report.seed, rows=rows, health=report.health, provenance=made)


def evaluate(
    checkpoint_dir: Path,
    *,
    recipe: Recipe | None = None,
    root: str | None = None,
    limit: int | None = None,
    transfer: Path | None = None,
    tier: str | None = None,
) -> Evaluation:
    """Attack the network of a checkpoint (or of a training run: its last one) as its recipe says.

    recipe: attacks and test images of another one instead. root and limit override the recipe's test images; transfer
    is the checkpoint of another network whose attacked images are tried as well; tier: of the gate, whose attacks are
    made in place of those the recipe names. Raises InputError for missing data or a damaged checkpoint.
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
    suite = Suite.of(network, entries, recipe.attack, seed=recipe.validation.seed, transfer=others)
    rule = f"the first {len(images)} test images of {data.name}"
    return Evaluation(
        images=rule,
        seed=recipe.validation.seed,
        provenance=provenance(),
        **_measured(network, suite, images, recipe.validation.batch_size, rule),
    )


def _measured(network: Source, suite: Suite, images: Images, size: int, rule: str) -> dict[str, Any]:
    """Rows and health checks."""
    x, y, n = images.unit(), images.classes, len(images)
    clean = predict(network.network, x, size, "clean").argmax(1)
    verdicts = {CLEAN: clean == y}
    rows = [EvaluatedRow(name=CLEAN, settings="test images as they are", n=n, score=Score.of(clean == y))]
    faults: list[str] = []
    samples = zero = not_finite = 0
    worst = clean == y
    for condition, attacked, predicted in outcomes(suite, x, y, clean, batch_size=size):
        verdicts[condition.name] = predicted == y
        if condition.eps is not None:
            worst &= predicted == y
        if condition.kind == "gradient" and condition.surrogate == network.trained:
            samples, zero = samples + attacked.evaluations, zero + attacked.zero
            not_finite += attacked.not_finite
        faults += health.budget_faults(condition.name, x, attacked.images, condition.eps)
        score = Score.of(predicted == y)
        rows.append(EvaluatedRow(name=condition.name, settings=condition.settings, n=n, score=score))
    verdicts[WORST] = worst
    rows.append(EvaluatedRow(name=WORST, settings="right under every condition within eps", n=n, score=Score.of(worst)))
    white = [name for name in verdicts if name.startswith((STRONG, "strong"))]
    blind = [name for name in (TRANSFER, SQUARE) if name in verdicts]
    checks = [
        health.check_budget(faults, rule),
        health.check_order(verdicts),
        *([health.check_black_box(verdicts, blind, white)] if blind else []),
        health.check_gradients(samples, zero, not_finite),
        health.check_compared(n),
    ]
    return {"rows": rows, "health": checks}


def other_network(checkpoint_dir: Path, shape: tuple[int, int, int], labels: tuple[str, ...]) -> Source:
    """A checkpoint's network to transfer attacks from. Raises InputError if it was not made for such images."""
    source = find_checkpoint(checkpoint_dir)
    found = load_checkpoint(source)
    require_alike(checkpoint_dir, (found.shape, found.labels), (shape, labels))
    network = load_model(source / found.weights, found.recipe, found.shape, len(found.labels))
    return Source(
        TorchNetwork(TorchModel(network, found.shape, found.recipe.validation.seed)), trained_surrogate(found.recipe)
    )
