"""What a bundle promises: the torch network attacked on the test images, as the artefact will be when validated."""

from mpdsgr_deploy.attacks.run import outcomes
from mpdsgr_deploy.attacks.suite import CLEAN, WORST, Source, Suite
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import Promise, Reference, digests
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork
from mpdsgr_deploy.surrogates import trained_surrogate


def measure(model: TorchModel, recipe: Recipe, images: Images, tier: str) -> tuple[Promise, Reference]:
    """Attack the torch network with everything a tier has; logits of other precisions are added by the caller."""
    network = TorchNetwork(model)
    attack, size, surrogate = recipe.attack, recipe.validation.batch_size, trained_surrogate(recipe)
    suite = Suite.of(Source(network, surrogate), TIERS[tier].entries, attack, seed=recipe.validation.seed)
    x, y = images.unit(), images.classes
    logits = predict(network, x, size, "clean")
    clean = logits.argmax(1)
    verdicts, worst = {CLEAN: clean == y}, clean == y
    for condition, _, predicted in outcomes(suite, x, y, clean, batch_size=size, of="torch, "):
        verdicts[condition.name] = predicted == y
        if condition.eps is not None:
            worst = worst & verdicts[condition.name]
    verdicts[WORST] = worst
    promise = Promise(
        data=recipe.data.name,
        n=len(images),
        tier=tier,
        correct={name: int(correct.sum()) for name, correct in verdicts.items()},
    )
    return promise, Reference(digests(images), {"fp32": logits}, verdicts)
