"""Input encodings: normalised images [B, C, H, W] to the current of T time steps [T, B, C, H, W]."""

from collections.abc import Callable

from torch import Tensor


def direct(x: Tensor, T: int) -> Tensor:
    """The image itself at every step (a view: no copy is made)."""
    return x.unsqueeze(0).expand(T, *x.shape)


ENCODINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"direct": direct}
