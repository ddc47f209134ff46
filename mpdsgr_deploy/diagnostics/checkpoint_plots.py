"""Plot the membrane potentials of a checkpoint's network."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.checkpoint import find_checkpoint
from mpdsgr_deploy.claimed_directories import claim_directory
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.data.batches import generator
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.diagnostics.distribution import measure
from mpdsgr_deploy.diagnostics.distribution_plots import layer_channels, layer_steps, overview
from mpdsgr_deploy.diagnostics.layer_statistics import LayerStatistics
from mpdsgr_deploy.diagnostics.picture import png
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.trained_networks import load_network

OVERVIEW = "overview.png"


def plot_checkpoint(
    directory: Path,
    out: Path,
    *,
    root: str | None = None,
    layers: Sequence[str] = (),
    channels: Sequence[int] = (),
    images: int = 128,
) -> tuple[str, list[LayerStatistics]]:
    """Measure the network of a checkpoint, or of a training run's last epoch, and write pictures into directory `out`.

    root: the directory of the data set, in place of the recipe's. images: the number of test images, the first ones.
    overview.png shows all layers. Each of `layers` (default: all) has pictures LAYER.png and LAYER-channels.png, and
    LAYER-channel-N.png for each N of `channels` that is below its number of channels.

    Returns a description of the images, and the statistics of all layers. Raises InputError for a damaged checkpoint,
    missing data, an unknown layer, or an `out` that holds other files.
    """
    checkpoint, model = load_network(find_checkpoint(directory))
    recipe = checkpoint.recipe
    known = {layer.name: layer for layer in model.layers()}
    chosen = {choose("layer", known, name).name for name in layers} or set(known)
    config = recipe.data.at(root)
    test_images = load_test(config)
    test_images.require_kind(config.name, checkpoint.shape, checkpoint.labels)
    claim_directory(out, OVERVIEW, "set of plots")
    pixels = torch.from_numpy(test_images[:images].unit())
    noise = generator(recipe.validation.seed, "inspect")
    measured = measure(model, pixels, batch_size=recipe.validation.batch_size, noise=noise)
    statistics = [layer.statistics() for layer in measured]
    write_atomic(out / OVERVIEW, png(overview(statistics)))
    for layer in measured:
        if layer.layer in chosen:
            name = layer.layer.replace("/", "-")
            write_atomic(out / f"{name}.png", png(layer_steps(layer)))
            write_atomic(out / f"{name}-channels.png", png(layer_channels(layer)))
            for channel in channels:
                if channel < layer.counts.shape[1]:
                    write_atomic(out / f"{name}-channel-{channel}.png", png(layer_steps(layer, channel)))
    return name_sample(len(pixels), config.name), statistics
