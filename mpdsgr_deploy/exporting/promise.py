"""What a bundle promises: the torch network attacked on the test images, as the artefact will be when validated."""

from mpdsgr_deploy.attacks.condition import WORST
from mpdsgr_deploy.attacks.measure import measure as measured
from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import TIERS, smaller_tiers
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import Nested, Promise, Reference, digests
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork
from mpdsgr_deploy.surrogates import trained_surrogate


def measure(model: TorchModel, recipe: Recipe, images: Images, tier: str) -> tuple[Promise, Reference]:
    """Attack the torch network with all conditions of a tier, and with those of smaller tiers that differ from them.

    Logits of other precisions are added by the caller. Raises InputError as the attacks do.
    """
    network = Source(TorchNetwork(model), trained_surrogate(recipe))
    size, seed = recipe.validation.batch_size, recipe.validation.seed
    suite = Suite.of(network, TIERS[tier].entries, recipe.attack, seed=seed)
    x, y = images.unit(), images.classes
    logits = predict(network.network, x, size, "clean")
    clean = logits.argmax(1)
    own = measured(suite, x, y, clean, batch_size=size, of="torch, ")
    settings = {condition.name: condition.settings for condition in suite.conditions}
    others = {
        (condition.name, condition.settings): condition
        for smaller in smaller_tiers(tier)
        for condition in Suite.of(network, TIERS[smaller].entries, recipe.attack, seed=seed).conditions
        if settings.get(condition.name) != condition.settings
    }
    rest = Suite(network, tuple(others.values()))
    below = measured(rest, x, y, clean, batch_size=size, of="torch, smaller tiers: ")
    nested = dict(zip(others, (outcome.correct for outcome in below.outcomes), strict=True))
    promise = Promise(
        data=recipe.data.name,
        n=len(images),
        tier=tier,
        correct={name: int(correct.sum()) for name, correct in own.verdicts.items()},
        settings=settings | {WORST: "right under every condition within eps"},
        nested=tuple(
            Nested(name=name, settings=how, correct=int(correct.sum())) for (name, how), correct in nested.items()
        ),
    )
    return promise, Reference(digests(images), {"fp32": logits}, own.verdicts, promise.settings, nested)
