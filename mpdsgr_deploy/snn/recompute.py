"""Layers that are computed again on the way back, instead of keeping what their gradients need (activation
checkpointing): a second forward pass in exchange for the memory of all layers but one.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpdsgr_deploy.snn.draws import Noise, repeatable
from mpdsgr_deploy.snn.layer import Observer, Reader, Temporal, Trace, fold_time
from mpdsgr_deploy.snn.saved import in_bytes, levels
from mpdsgr_deploy.snn.tdbn import frozen_statistics


def groups(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """The modules in runs that are computed again together: a temporal one and the stateless ones behind it.

    What a pooling layer receives is thus not kept. Stateless modules before the first temporal one join its run.
    """
    runs: list[list[nn.Module]] = [[]]
    for module in modules:
        if isinstance(module, Temporal) and any(isinstance(other, Temporal) for other in runs[-1]):
            runs.append([])
        runs[-1].append(module)
    return runs


def one(module: nn.Module, x: Tensor, observe: Observer | None, noise: Noise) -> Tensor:
    """The module on [T, B, ...]; a stateless one sees time folded into the batch."""
    return module(x, observe, noise) if isinstance(module, Temporal) else fold_time(module, x)


def one_by_one(
    modules: Iterable[nn.Module], x: Tensor, observe: Observer | None, noise: Noise, *, recompute: bool
) -> Tensor:
    """The modules one after the other on [T, B, ...]; what they save for their gradients takes little room."""
    if not torch.is_grad_enabled():
        for module in modules:
            x = one(module, x, observe, noise)
        return x
    n: int | None = None
    for group in groups(modules) if recompute else ([module] for module in modules):
        with in_bytes(x, n):
            x = recomputed(group, x, observe, noise) if recompute else one(group[0], x, observe, noise)
        for module in group:
            n = levels(module, n)
    return x


def recomputed(modules: Sequence[nn.Module], x: Tensor, observe: Observer | None, noise: Noise) -> Tensor:
    """The modules one after the other, to the bit, where nothing is kept but x and what the observer keeps.

    The second time draws the same noise and leaves running statistics alone. An observer is called once a layer; but
    only a `Reader` spares memory, since whoever holds a trace holds its tensors.
    """
    drawn, again = repeatable(noise)
    first = True

    def run(x: Tensor) -> tuple[Tensor, list[Any]]:
        nonlocal first
        seen: list[Any] = []
        source, statistics = (drawn, nullcontext()) if first else (again(), frozen_statistics(*modules))
        first = False

        def look(trace: Trace) -> None:
            seen.append(observe.read(trace) if isinstance(observe, Reader) else trace)

        with statistics:
            for module in modules:
                x = one(module, x, None if observe is None else look, source)
            return x, seen

    y, seen = checkpoint(run, x, use_reentrant=False, preserve_rng_state=noise is None)
    if observe is not None:
        keep = observe.keep if isinstance(observe, Reader) else observe
        for reading in seen:
            keep(reading)
    return y
