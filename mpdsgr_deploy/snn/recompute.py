"""Layers that are computed again on the way back, instead of keeping what their gradients need (activation
checkpointing): a second forward pass in exchange for the memory of all layers but one.

Spikes that are saved take one byte each, exactly, because they are multiples of a known fraction in [0, 1].
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpdsgr_deploy.snn.draws import Noise, repeatable
from mpdsgr_deploy.snn.layer import Observer, Reader, SpikingLayer, Temporal, Trace, fold_time
from mpdsgr_deploy.snn.tdbn import frozen_statistics

MOST = 64  # levels: the largest power of four (as windows of 2^k x 2^k give) that fits into int8


def levels(module: nn.Module, received: int | None) -> int | None:
    """n if the module hands on multiples of 1/n in [0, 1], n a power of two; None if that is not known.

    received: the same of what it is given. Spikes have n = 1; the average over four of them n = 4.
    """
    match module:
        case SpikingLayer():
            return 1 if module.neuron.binary else None
        case nn.Flatten():
            return received
        case nn.AvgPool2d(kernel_size=int(side), padding=0) if received is not None:
            finer = received * side**2
            return finer if side & (side - 1) == 0 and finer <= MOST else None
    return None


@contextmanager
def in_bytes(x: Tensor, n: int | None) -> Iterator[None]:
    """Save x, multiples of 1/n in [0, 1], as int8 within a with block; with n None save it as it is."""
    if n is None or torch.compiler.is_compiling():
        yield
        return
    storage, size = x.untyped_storage()._cdata, x.numel()

    def pack(saved: Tensor) -> Tensor | tuple[Tensor, torch.dtype]:
        if saved.untyped_storage()._cdata != storage or saved.numel() != size:
            return saved
        # on a CPU six times as fast as a conversion to uint8
        return (saved if n == 1 else saved * n).to(torch.int8), saved.dtype

    def unpack(packed: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        count, dtype = packed
        return count.to(dtype) if n == 1 else count.to(dtype).mul_(1 / n)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


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
