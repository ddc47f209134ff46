"""Exports and attacks each network once in a test run: both take seconds, and bundles of one network are many.

Networks that differ in their weights alone are exported once too: what the exporter writes for the first of them serves
the others with their own weights in it, which `test_export` compares with what the exporter writes for these.
"""

import hashlib
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from once import make_once
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from mpdsgr_deploy.attacks import promise as attacking
from mpdsgr_deploy.attacks.condition import Floats
from mpdsgr_deploy.attacks.tiers import TIERS, smaller_tiers
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.exporting import onnx_writer
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import Promise, Reference
from mpdsgr_deploy.runtime.torch_model import TorchNetwork
from mpdsgr_deploy.snn import Surrogate

Shape = tuple[int, int, int]
one_registry = staticmethod(cache(ONNXRegistry.from_torchlib))
"""In place of that method, which takes a quarter of an export: exports only read what it returns."""
_known: dict[str, tuple[nn.Module, ir.Model]] = {}
_attacked: list[nn.Module] = []
shared: Callable[[str, Callable[[Path], object]], Path] | None = None
"""Fills a file that all processes of a test run share; set by `use`."""


def use(patch: pytest.MonkeyPatch, base: Path) -> None:
    """Have this process export each network once, into files under `base`."""
    patch.setattr(sys.modules[__name__], "shared", partial(make_once, base))
    patch.setattr(ONNXRegistry, "from_torchlib", one_registry)
    for place in ("bundle_writer", "rebuild", "step_search"):
        patch.setattr(f"mpdsgr_deploy.exporting.{place}.to_graph", to_graph)


def content(tensor: Tensor) -> object:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest(), kind(tensor)


def kind(tensor: Tensor) -> object:
    return str(tensor.dtype), tuple(tensor.shape)


def identity(value: object, of_tensor: Callable[[Tensor], object] = content) -> object:
    """Equal for equal settings of modules; of what cannot be compared, equal for the same object alone."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, Surrogate) and value.parameter is not None:
        return value.name, value.parameter
    if isinstance(value, set):
        return tuple(sorted(map(repr, value)))
    if isinstance(value, tuple | list):
        return tuple(identity(entry, of_tensor) for entry in value)
    if isinstance(value, dict):
        return tuple((identity(name), identity(entry, of_tensor)) for name, entry in value.items())
    if isinstance(value, nn.Module):
        return identity(type(value)), identity(vars(value), of_tensor)
    if is_dataclass(value) and not isinstance(value, type):
        entries = (identity(getattr(value, field.name), of_tensor) for field in fields(value))
        return identity(type(value)), tuple(entries)
    name = getattr(value, "__qualname__", "<")
    has_name = "<" not in name and not hasattr(value, "__self__")  # unlike <lambda>, <locals> and methods
    if callable(value) and has_name:
        return value.__module__, name
    return type(value).__qualname__, os.getpid(), id(value)


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def to_graph(model: nn.Module, shape: Shape) -> ir.Model:
    """As `onnx_writer.to_graph`, but for a network that any worker has exported a copy of the graph that it made."""
    key = digest(identity(model), shape)
    if key not in _known:
        _known[key] = model, _exported(model, shape, key)  # the model too, lest another object gets the id of a part
    return _known[key][1].clone()


def _exported(model: Any, shape: Shape, key: str) -> ir.Model:
    """The graph of a network that any worker exported and that differs from this one in its weights at most."""
    if shared is None:
        return onnx_writer.to_graph(model, shape)
    weights = model.state_dict(keep_vars=True)
    learned = {id(tensor) for tensor in weights.values()}
    structure = identity(model, lambda tensor: kind(tensor) if id(tensor) in learned else content(tensor))
    for name in (digest(structure, shape), key):
        file = shared(f"{name}.graph", lambda path: path.write_bytes(pickle.dumps(written(model, shape))))
        network, fixed = pickle.loads(file.read_bytes())
        if all(content(weights[name]) == value for name, value in fixed.items()):
            break
    graph = ir.from_proto(onnx.load_from_string(network))
    for name in weights.keys() - fixed.keys():
        graph.graph.initializers[name].const_value = ir.tensor(weights[name].detach().numpy(), name=name)
    return graph


def written(model: Any, shape: Shape) -> tuple[bytes, dict[str, object]]:
    """What the exporter writes, and the values of those weights that no others can replace in it.

    These are weights that the exporter computed with, and those that have several uses, because it keeps one of equal
    constants.
    """
    graph, fixed = onnx_writer.to_graph(model, shape), {}
    for name, tensor in model.state_dict().items():
        constant = graph.graph.initializers.get(name)
        value = constant and constant.const_value
        if value is None or len(constant.uses()) > 1 or not np.array_equal(value.numpy(), tensor.numpy()):
            fixed[name] = content(tensor)
    return ir.to_proto(graph).SerializeToString(), fixed


def promise(
    network: TorchNetwork, recipe: Recipe, images: Images, tier: str, logits: Floats, *, of: str
) -> tuple[Promise, Reference]:
    """As `attacks.promise.promise`; of a network that any worker has attacked in the same way, what it measured."""

    def measured() -> tuple[Promise, Reference]:
        return attacking.promise(network, recipe, images, tier, logits, of=of)

    if shared is None:
        return measured()
    arrays = [torch.from_numpy(array) for array in (images.pixels, images.classes, logits)]
    tiers = [repr(TIERS[name]) for name in (*smaller_tiers(tier), tier)]
    model = network._model._model
    _attacked.append(model)  # lest another object gets the id of a part
    parts = (model, recipe.model_dump_json(), images.labels, *arrays, *tiers)
    file = shared(f"{digest(identity(parts))}.promise", lambda path: path.write_bytes(pickle.dumps(measured())))
    answer: tuple[Promise, Reference] = pickle.loads(file.read_bytes())
    return answer
