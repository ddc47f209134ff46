"""Threshold-dependent batch normalisation (tdBN, Zheng et al., arXiv 2011.05280)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from mpdsgr_deploy.snn.joint_norm import joint_norm


class TdBN(nn.Module):
    """y = lambda alpha V_th (x - mean) / sqrt(var + eps) + beta, per channel.

    Input [T*B, C, ...]: folding time into the batch makes the statistics joint over (T, B, H, W), as tdBN asks.
    `weight` is lambda [C] (starts at 1) and `bias` beta [C] (starts at 0), so the current that reaches a neuron is
    N(beta, (lambda alpha V_th)^2). alpha is 1, or 1/sqrt(n) where n branches meet before one neuron.
    `synchronised`: in training the statistics are joint over the processes of torch.distributed as well.
    """

    synchronised: bool = False

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, channels: int, *, v_threshold: float, alpha: float = 1.0, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.alpha, self.v_threshold, self.eps, self.momentum = alpha, v_threshold, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    @property
    def scale(self) -> Tensor:
        """lambda alpha V_th [C]: the signed standard deviation of the current."""
        return self.weight * (self.alpha * self.v_threshold)

    def forward(self, x: Tensor) -> Tensor:
        if self.synchronised and self.training and distributed.is_initialized():
            running = self.running_mean, self.running_var
            return joint_norm(x, *running, self.scale, self.bias, momentum=self.momentum, eps=self.eps)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.scale,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, alpha={self.alpha}, v_threshold={self.v_threshold}"


@contextmanager
def frozen_statistics(*models: nn.Module) -> Iterator[None]:
    """Keep the running statistics of tdBN and batch normalisation unchanged for the length of a with block.

    In train mode a batch is still normalised by its own statistics: they merely enter with momentum 0. (Restoring the
    buffers afterwards would invalidate every graph that saved them.)
    """
    norms = [part for model in models for part in model.modules() if isinstance(part, TdBN | nn.BatchNorm2d)]
    before = [(norm, norm.momentum, getattr(norm, "num_batches_tracked", None)) for norm in norms]
    for norm, _, batches in before:
        norm.momentum = 0.0
        if batches is not None:
            norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            if batches is not None:
                norm.num_batches_tracked = batches
