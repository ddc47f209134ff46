"""Exports each network once in a test run: torch's exporter takes seconds, and bundles of one network are many."""

import hashlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any

from torch import Tensor, nn

from mpdsgr_deploy.snn import Surrogate

Exporter = Callable[[nn.Module, tuple[int, int, int]], Any]


def identity(value: object) -> object:
    """Equal for equal settings of modules; of what cannot be compared, equal for the same object alone."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().numpy().tobytes()).hexdigest(), value.dtype, tuple(value.shape)
    if isinstance(value, Surrogate) and value.parameter is not None:
        return value.name, value.parameter
    if isinstance(value, set):
        return tuple(sorted(map(repr, value)))
    if isinstance(value, tuple | list):
        return tuple(map(identity, value))
    if isinstance(value, dict):
        return tuple((name, identity(entry)) for name, entry in value.items())
    if isinstance(value, nn.Module):
        return type(value), identity(vars(value))
    if is_dataclass(value):
        return type(value), tuple(identity(getattr(value, field.name)) for field in fields(value))
    return value if callable(value) else (type(value), id(value))


def once(export: Exporter) -> Exporter:
    """The same exporter, which answers for a network that it knows with a copy of the graph it made."""
    known: dict[object, tuple[nn.Module, Any]] = {}

    @wraps(export)
    def remembered(model: nn.Module, shape: tuple[int, int, int]) -> Any:
        key = identity(model), shape
        if key not in known:
            known[key] = model, export(model, shape)  # the model too, lest another object gets the id of a part of it
        return known[key][1].clone()

    return remembered
