"""What a machine reaches without a network: the rate of its matrix product and of its memory."""

from collections.abc import Callable

import harness
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def product_rate(precision: str, device: str, size: int, repetitions: int = 5) -> float:
    """Operations per second of a square matrix product, the best of several; a multiply-accumulate counts as two."""
    a, b = (torch.rand(size, size, dtype=DTYPES[precision], device=device) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, repetitions)


def copy_rate(device: str) -> float:
    """Bytes per second that a copy of 256 MiB reads and writes, the best of several."""
    source = torch.rand(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source))


def fastest(call: Callable[[], object], repetitions: int = 5) -> float:
    """Seconds of the quickest call, the first one not counted."""
    return min([harness.timed(call) for _ in range(repetitions)][1:])
