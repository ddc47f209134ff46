"""Measure a bundle's promise: its network's accuracy on test images, without attack and under each attack of a tier."""

from mpdsgr_deploy.attacks.condition import WORST, Floats, Network, Source
from mpdsgr_deploy.attacks.resumable_run import Journal, classes_of
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.attacks.suite_measurement import measure
from mpdsgr_deploy.attacks.tiers import TIERS, smaller_tiers
from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import Nested, Promise, Reference, digests
from mpdsgr_deploy.surrogates import trained_surrogate


def promise(
    network: Network,
    recipe: Recipe,
    images: Images,
    tier: str,
    logits: Floats,
    *,
    of: str,
    journal: Journal | None = None,
) -> tuple[Promise, Reference]:
    """Attack `network` with all conditions of a tier, and with the conditions of smaller tiers that differ from these.

    logits [N, K]: the network's logits for the clean images [N, C, H, W]; the caller adds those of other precisions to
    the returned Reference. of: name of the network in progress bars. journal: stores finished batches of the tier's own
    conditions. Raises InputError if an attack does, for example for an unknown surrogate.
    """
    source = Source(network, trained_surrogate(recipe))
    size, seed = recipe.validation.batch_size, recipe.validation.seed
    suite = Suite.of(source, TIERS[tier].entries, recipe.attack, seed=seed)
    x, y, clean = images.unit(), images.classes, classes_of(logits)
    own = measure(suite, x, y, clean, batch_size=size, journal=journal, of=f"{of}, ")
    settings = {condition.name: condition.settings for condition in suite.conditions}
    others = {
        (condition.name, condition.settings): condition
        for smaller in smaller_tiers(tier)
        for condition in Suite.of(source, TIERS[smaller].entries, recipe.attack, seed=seed).conditions
        if settings.get(condition.name) != condition.settings
    }
    rest = Suite(source, tuple(others.values()))
    below = measure(rest, x, y, clean, batch_size=size, of=f"{of}, smaller tiers: ")
    nested = dict(zip(others, (outcome.correct for outcome in below.outcomes), strict=True))
    figures = Promise(
        data=recipe.data.name,
        n=len(images),
        tier=tier,
        correct={name: int(correct.sum()) for name, correct in own.verdicts.items()},
        settings=settings | {WORST: "right under every condition within eps"},
        nested=tuple(
            Nested(name=name, settings=how, correct=int(correct.sum())) for (name, how), correct in nested.items()
        ),
    )
    return figures, Reference(digests(images), {"fp32": logits}, own.verdicts, figures.settings, nested)
