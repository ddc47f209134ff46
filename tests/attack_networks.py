"""One small network of each kind, its graph, its attack graph in a session, and images to attack it with."""

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import torch
from conftest import small_recipe
from exporting_once import to_graph
from stochastic_networks import exported as exported_stochastic
from test_export import NAMES, exported, learned

from mpdsgr_deploy.attack_graph import attack_graph
from mpdsgr_deploy.models import SpikingNet, build_model
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.runtime.session import CPU, Session
from mpdsgr_deploy.surrogates import parse_surrogate

SMALL = (1, 8, 8)


@cache
def frames() -> tuple[SpikingNet, ir.Model, tuple[int, int, int]]:
    """A warmed-up network of event frames, its graph and the shape of its images."""
    torch.manual_seed(0)
    shape, model = (6, 8, 8), build_model(small_recipe(encoding={"name": "frames", "T": 3}), (6, 8, 8), 10)
    for layer in model.layers():
        layer.norm.momentum = 1.0
    model(torch.rand(32, *shape))
    return model.eval(), to_graph(simplify(model), shape), shape


NETWORKS: dict[str, Callable[[], tuple[SpikingNet, ir.Model, tuple[int, int, int]]]] = {
    **{name: lambda name=name: exported(name) for name in NAMES},  # type: ignore[misc]
    "soft reset": lambda: exported("vgg-small", "soft"),
    "poisson": lambda: (*exported_stochastic("poisson"), SMALL),
    "rsc and stog": lambda: (*exported_stochastic("rsc and stog"), SMALL),
    "feel": lambda: (*learned("feel", "frequency"), SMALL),
    "dlif": lambda: (*learned("dlif", "direct"), SMALL),
    "frames": frames,
}


def images(count: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.random((count, *shape), np.float32), draw.integers(0, 10, count)


class Run:
    """An attack graph in a session of its own: every output by name."""

    def __init__(self, network: onnx.ModelProto, surrogate: str) -> None:
        self.graph = attack_graph(network, surrogate)
        onnx.checker.check_model(self.graph, full_check=True)
        self.width = parse_surrogate(surrogate).width
        self.session = Session(self.graph, CPU, source="the test")

    def __call__(self, x: np.ndarray, y: np.ndarray, loss: float = 0, **further: np.ndarray) -> dict[str, np.ndarray]:
        scalars = {"width": np.array(self.width, np.float32), "loss": np.array(loss, np.float32)}
        inputs = {"images": x, "classes": y, **scalars, **further}
        return dict(zip(self.session.outputs, self.session(inputs, self.session.outputs), strict=True))


def deviation(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each image's gradient, in its largest component, relative to that [B]."""
    return np.abs(found - expected).max((1, 2, 3)) / np.abs(expected).max((1, 2, 3)).clip(1e-30)
