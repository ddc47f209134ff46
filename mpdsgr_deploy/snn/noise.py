"""Random numbers for stochastic networks, from an explicit generator.

They are drawn on the CPU and then moved, so that a seed gives the same spikes on every device. None stands for torch's
global generator, as in torch itself.
"""

import torch
from torch import Tensor

Noise = torch.Generator | None


def uniform(steps: int, x: Tensor, noise: Noise) -> Tensor:
    """U[0, 1) of shape [steps, *x.shape], on x's device and in its dtype; fresh for every step."""
    return torch.rand((steps, *x.shape), generator=noise, device="cpu").to(x)


def normal(steps: int, x: Tensor, noise: Noise) -> Tensor:
    """N(0, 1) of shape [steps, *x.shape], on x's device and in its dtype; fresh for every step."""
    return torch.randn((steps, *x.shape), generator=noise, device="cpu").to(x)
