"""The untrained networks that benchmarks of speed time: what they compute does not depend on their weights."""

import tempfile
from pathlib import Path

import torch

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.checkpoint import Checkpoint, save_checkpoint
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.models import SpikingNet, build_model
from mpdsgr_deploy.recipe import Recipe

SHAPE, CLASSES = (3, 32, 32), 10


def settled(recipe: Recipe) -> SpikingNet:
    """An untrained network whose tdBN has seen images, so that its neurons fire."""
    torch.manual_seed(0)
    model = build_model(recipe, SHAPE, CLASSES)
    for layer in model.layers():
        if layer.norm is not None:
            layer.norm.momentum = 1.0  # one pass settles the running statistics
    with torch.no_grad():
        model(torch.rand(16, *SHAPE))
    return model.eval()


def untrained_bundle(recipe: Recipe, out: Path) -> Bundle:
    """The bundle of such a network, without the data set of its recipe: golden inputs are noise."""
    labels = tuple(f"class {k}" for k in range(CLASSES))
    checkpoint = Checkpoint(recipe=recipe, shape=SHAPE, labels=labels, epoch=0, metrics={}, history=[], provenance={})
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), checkpoint, settled(recipe).state_dict())
        return export(Path(folder), out)
