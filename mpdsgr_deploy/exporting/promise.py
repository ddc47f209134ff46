"""What a bundle promises: the torch network attacked on the test images, as the artefact will be when validated."""

from mpdsgr_deploy.attacks.promise import promise
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import Promise, Reference
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork


def measure(model: TorchModel, recipe: Recipe, images: Images, tier: str) -> tuple[Promise, Reference]:
    """As `attacks.promise`, of the torch network. Logits of other precisions are added by the caller."""
    network = TorchNetwork(model)
    logits = predict(network, images.unit(), recipe.validation.batch_size, "clean")
    return promise(network, recipe, images, tier, logits, of="torch")
