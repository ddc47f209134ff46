"""Read the time steps of neurons as rows in memory order, for functions that treat all elements alike."""

from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether the steps of x [T, B, ...] follow each other in memory and have no gaps, in any order of their axes."""
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return len(x) == 1 or x.stride(0) == expected


def strided_as(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the tensor with these strides, copied unless it has them already."""
    return tensor if tensor.stride() == stride else tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)


class MemoryOrder(NamedTuple):
    """Shape and strides of one step [B, ...]."""

    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Return the order of x [T, B, ...], or that of a contiguous tensor if x is not dense."""
        dense = x if is_dense(x) else x.contiguous()
        return cls(x.shape[1:], dense.stride()[1:])

    def flattened(self, x: Tensor | None) -> Tensor | None:
        """Reshape [T, B, ...] to [T, N], or [B, ...] to [N], in memory order."""
        if x is None:
            return None
        N, steps = prod(self.shape), x.shape[: x.dim() - len(self.shape)]
        outer = (N,) * len(steps)
        return strided_as(x, (*outer, *self.stride)).as_strided((*steps, N), (*outer, 1))

    def restored(self, y: Tensor) -> Tensor:
        """Reverse `flattened`."""
        steps = y.shape[:-1]
        return y.as_strided((*steps, *self.shape), (*y.stride()[:-1], *self.stride))
