"""Spikes saved for the backward pass in one byte each: exact, for they are multiples of a known fraction in [0, 1]."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpdsgr_deploy.snn.layer import SpikingLayer

MOST = 64  # levels: the largest power of four, which windows of a power of two lead to, that an int8 counts to


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
        return (saved if n == 1 else saved * n).to(torch.int8), saved.dtype  # on a CPU six times as fast as to uint8

    def unpack(packed: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        count, dtype = packed
        return count.to(dtype) if n == 1 else count.to(dtype).mul_(1 / n)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
