"""An exponential moving average of the weights over a run's steps, used in place of the last weights.

    a <- d_s a + (1 - d_s) w,    d_s = min(decay, (1 + s) / (10 + s))

after step s, counted from 0 over the whole run, so that the untrained weights are forgotten within a few tens of steps.
The averaged network's activations differ from those of every network in the average, so its running statistics are
measured before it is used.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.snn import TdBN


@torch.no_grad()
def update_average(average: SpikingNet, model: SpikingNet, *, decay: float, step: int) -> None:
    """Add the weights after `step` of the run to the average. Its running statistics do not change."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


@torch.no_grad()
def measure_statistics(model: SpikingNet, batches: Iterable[Tensor], noise: torch.Generator) -> None:
    """Set the running statistics of tdBN and batch normalisation to their means over batches of images [B, C, H, W]."""
    norms = [part for part in model.modules() if isinstance(part, TdBN | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for number, x in enumerate(batches, 1):
        for norm in norms:
            norm.momentum = 1 / number  # of the n-th batch: a mean over all n
        model(x, None, noise)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
