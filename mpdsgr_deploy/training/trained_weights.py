"""Find the weights of a trained network in a checkpoint or a bundle, from which another training run can start."""

from pathlib import Path
from typing import Any, NamedTuple

from mpdsgr_deploy.bundle import MANIFEST, WEIGHTS, open_bundle
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.recipe import Recipe


class TrainedWeights(NamedTuple):
    """A safetensors file of weights, and facts about the network and its training.

    sha256: of the file. shape: (C, H, W) of the images. epoch: the epoch, counted from 1, after which the weights were
    saved. init: the `Checkpoint.init` of that training, which bundles do not record.
    """

    file: Path
    sha256: str
    recipe: Recipe
    shape: tuple[int, int, int]
    labels: tuple[str, ...]
    epoch: int
    provenance: dict[str, Any]
    init: dict[str, Any] | None = None


def find_weights(path: Path) -> TrainedWeights:
    """Find the weights in a bundle, a training run (its last epoch's) or a checkpoint.

    Raises InputError as `open_bundle` and `load_checkpoint` do, for a directory that is none of these, and for a bundle
    whose network was not trained by this package.
    """
    if (path / MANIFEST).is_file():
        return _of_bundle(path)
    directory = find_checkpoint(path)
    checkpoint = load_checkpoint(directory)
    file = directory / checkpoint.weights
    return TrainedWeights(
        file,
        checkpoint.weights_sha256,
        checkpoint.recipe,
        checkpoint.shape,
        checkpoint.labels,
        checkpoint.epoch,
        checkpoint.provenance,
        checkpoint.init,
    )


def _of_bundle(path: Path) -> TrainedWeights:
    bundle = open_bundle(path)
    manifest, history = bundle.manifest, bundle.manifest.provenance
    return TrainedWeights(
        bundle.weights("give --init the torch module it was made from (package.module:function)"),
        manifest.files[WEIGHTS],
        manifest.recipe,
        manifest.input_shape,
        manifest.labels,
        history["epoch"],
        history["training"],
    )
