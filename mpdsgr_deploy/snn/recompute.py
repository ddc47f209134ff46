"""Activation checkpointing: recompute layers in the backward pass instead of storing what their gradients need.

This takes a second forward pass and saves the memory of all layers but one. Stored spikes take one byte each, without
loss, because they are multiples of a known fraction in [0, 1].
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

MOST = 64  # levels; the largest power of four that fits into int8, since pooling windows have 2^k x 2^k values


def levels(module: nn.Module, received: int | None) -> int | None:
    """Return n if the outputs of the module are multiples of 1/n in [0, 1], n a power of two; None if unknown.

    received: the n of its inputs. Spikes have n = 1, and averages over four spikes n = 4.
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
    """In a with block, store x, multiples of 1/n in [0, 1], as int8 for the backward pass; with n None, unchanged."""
    if n is None or torch.compiler.is_compiling():
        yield
        return
    storage, size = x.untyped_storage()._cdata, x.numel()

    def pack(saved: Tensor) -> Tensor | tuple[Tensor, torch.dtype]:
        if saved.untyped_storage()._cdata != storage or saved.numel() != size:
            return saved
        # int8, because on a CPU the conversion to uint8 takes six times as long
        return (saved if n == 1 else saved * n).to(torch.int8), saved.dtype

    def unpack(packed: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        count, dtype = packed
        return count.to(dtype) if n == 1 else count.to(dtype).mul_(1 / n)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def groups(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Group modules that are recomputed together: a temporal module and the stateless modules that follow it.

    The input of a pooling layer is therefore not stored. Stateless modules before the first temporal one belong to its
    group.
    """
    runs: list[list[nn.Module]] = [[]]
    for module in modules:
        if isinstance(module, Temporal) and any(isinstance(other, Temporal) for other in runs[-1]):
            runs.append([])
        runs[-1].append(module)
    return runs


def one(module: nn.Module, x: Tensor, observe: Observer | None, noise: Noise) -> Tensor:
    """Apply a module to [T, B, ...]; a stateless module gets time folded into the batch."""
    return module(x, observe, noise) if isinstance(module, Temporal) else fold_time(module, x)


def one_by_one(
    modules: Iterable[nn.Module], x: Tensor, observe: Observer | None, noise: Noise, *, recompute: bool
) -> Tensor:
    """Apply modules one after the other to [T, B, ...], storing spikes for the backward pass in one byte each.

    recompute: store only the inputs of groups of modules, and recompute the groups in the backward pass.
    """
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
    """Apply modules one after the other, storing only x for the backward pass; results have the same bits.

    The second forward pass draws the same noise and leaves running statistics unchanged. An observer is called once per
    layer. Only a `Reader` saves memory, because a stored trace keeps its tensors.
    """
    recorded_noise, repeated_noise = repeatable(noise)
    first = True

    def run(x: Tensor) -> tuple[Tensor, list[Any]]:
        nonlocal first
        readings: list[Any] = []
        source, statistics = (
            (recorded_noise, nullcontext()) if first else (repeated_noise(), frozen_statistics(*modules))
        )
        first = False

        def look(trace: Trace) -> None:
            readings.append(observe.read(trace) if isinstance(observe, Reader) else trace)

        with statistics:
            for module in modules:
                x = one(module, x, None if observe is None else look, source)
            return x, readings

    y, readings = checkpoint(run, x, use_reentrant=False, preserve_rng_state=noise is None)
    if observe is not None:
        keep = observe.keep if isinstance(observe, Reader) else observe
        for reading in readings:
            keep(reading)
    return y
