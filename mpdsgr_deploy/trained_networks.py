"""Rebuild trained networks from the recipe and the weights in a checkpoint or a bundle."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.checkpoint import Checkpoint, load_checkpoint
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.recipe import Recipe


def load_network(directory: Path) -> tuple[Checkpoint, SpikingNet]:
    """Return the checkpoint in `directory`, and its network in eval mode on the CPU.

    Raises InputError as `load_checkpoint` and `load_model` do.
    """
    checkpoint = load_checkpoint(directory)
    weights = directory / checkpoint.weights
    return checkpoint, load_model(weights, checkpoint.recipe, checkpoint.shape, len(checkpoint.labels))


def load_bundled(bundle: Bundle, *, otherwise: str) -> SpikingNet:
    """Return the torch network of a bundle, in eval mode on the CPU.

    Raises InputError as `Bundle.weights`, which explains `otherwise`, and `load_model` do.
    """
    manifest = bundle.manifest
    return load_model(bundle.weights(otherwise), manifest.recipe, manifest.input_shape, len(manifest.labels))


def load_model(weights: Path, recipe: Recipe, shape: tuple[int, int, int], classes: int) -> SpikingNet:
    """Return the network of a recipe with weights from a safetensors file, in eval mode on the CPU.

    shape: (C, H, W) of the images. classes: number of classes. Raises InputError if the weights do not fit the network.
    """
    model, _ = build_defended(recipe, shape, classes)
    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{weights} does not hold the weights of model {recipe.model.name!r}: {reason}") from None
    return model.eval()
