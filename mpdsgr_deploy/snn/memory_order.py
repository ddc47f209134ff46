"""Steps of neurons as they lie in memory: what treats every element alike reads them as rows, whatever their shape."""

from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether step follows step in memory, and each fills its own without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return len(x) == 1 or x.stride(0) == expected


def strided_as(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor with these strides; a copy unless it has them."""
    return tensor if tensor.stride() == stride else tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)


class MemoryOrder(NamedTuple):
    """Shape and strides of one step [B, ...]."""

    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """The order of x [T, B, ...], or that of a contiguous tensor if its steps are not dense."""
        dense = x if is_dense(x) else x.contiguous()
        return cls(x.shape[1:], dense.stride()[1:])

    def flattened(self, x: Tensor | None) -> Tensor | None:
        """[T, B, ...] to [T, N], or [B, ...] to [N]."""
        if x is None:
            return None
        N, steps = prod(self.shape), x.shape[: x.dim() - len(self.shape)]
        outer = (N,) * len(steps)
        return strided_as(x, (*outer, *self.stride)).as_strided((*steps, N), (*outer, 1))

    def restored(self, y: Tensor) -> Tensor:
        """Back from `flattened`."""
        steps = y.shape[:-1]
        return y.as_strided((*steps, *self.shape), (*y.stride()[:-1], *self.stride))
