"""Small random networks that draw noise, and their graphs."""

from functools import cache

import numpy as np
import onnx_ir as ir
import torch
from conftest import small_recipe
from exporting_once import to_graph

from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.recipe import Recipe

SHAPE = (1, 8, 8)
GATES = [(3, 8, 8, 8), (3, 16, 4, 4), (3, 16, 4, 4)]  # of the small network's neurons, a draw a step
NETWORKS = {
    "poisson": (small_recipe(encoding={"name": "poisson", "T": 3}), {"uniform_0": (3, *SHAPE)}),
    "sqe": (small_recipe(encoding={"name": "sqe", "levels": 3, "T": 3}), {"uniform_0": (3, *SHAPE)}),
    "rsc and stog": (
        small_recipe(encoding={"name": "rsc", "T": 3}, defence={"stog": {}}),
        {"normal_0": (3, *SHAPE), **{f"uniform_{i + 1}": shape for i, shape in enumerate(GATES)}},
    ),
}


def warmed_up(recipe: Recipe) -> SpikingNet:
    """A random network whose layers all fire and whose gates, if any, are neither open nor closed."""
    torch.manual_seed(0)
    model, _ = build_defended(recipe, SHAPE, 10)
    for layer in model.layers():
        for p in layer.neuron.parameters():
            torch.nn.init.uniform_(p, 0.3, 0.9)
        layer.norm.momentum = 1.0
    model(torch.rand(32, *SHAPE))
    return model.eval()


@cache
def exported(name: str) -> tuple[SpikingNet, ir.Model]:
    """One of the networks and its graph, for tests to read: the exporter takes its time."""
    model = warmed_up(NETWORKS[name][0])
    return model, to_graph(simplify(model), SHAPE)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, *SHAPE), np.float32)
