"""Input encodings: normalised images [B, C, H, W] to the current of T time steps [T, B, C, H, W]."""

from collections.abc import Callable

import torch
from torch import Tensor


def direct(x: Tensor, T: int) -> Tensor:
    """The image itself at every step. Stacked, not expanded: exported, that is free of shape arithmetic."""
    return torch.stack([x] * T)


ENCODINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"direct": direct}
