"""Open a checkpoint's network whose attacked images are tried on another network; needs torch."""

from pathlib import Path

from mpdsgr_deploy.attacks.condition import Source
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.networks import load_model
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.validation.image_checks import require_alike


def other_network(checkpoint_dir: Path, shape: tuple[int, int, int], labels: tuple[str, ...]) -> Source:
    """Open a checkpoint's network to transfer attacks from. Raises InputError if it was not made for such images."""
    source = find_checkpoint(checkpoint_dir)
    checkpoint = load_checkpoint(source)
    require_alike(checkpoint_dir, (checkpoint.shape, checkpoint.labels), (shape, labels))
    network = load_model(source / checkpoint.weights, checkpoint.recipe, checkpoint.shape, len(checkpoint.labels))
    return Source(
        TorchNetwork(TorchModel(network, checkpoint.shape, checkpoint.recipe.validation.seed)),
        trained_surrogate(checkpoint.recipe),
    )
