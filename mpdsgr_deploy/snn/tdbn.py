"""Threshold-dependent batch normalisation (tdBN, Zheng et al., arXiv 2011.05280).

With several processes, whose batches have the same size, the statistics can be computed over all batches together. The
forward pass gathers the means and variances of all processes; the backward pass sums the two reductions over the batch
that the gradient through the statistics needs. The gradients of scale and shift are those of each process alone,
because they are averaged over processes together with those of all other parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


class TdBN(nn.Module):
    """y = lambda alpha V_th (x - mean) / sqrt(var + eps) + beta, per channel.

    The input is [T*B, C, ...]: time folded into the batch makes the statistics joint over (T, B, H, W), as tdBN
    requires. `weight` is lambda [C], initially 1, and `bias` is beta [C], initially 0, so the input current of a neuron
    is distributed as N(beta, (lambda alpha V_th)^2). alpha is 1, or 1/sqrt(n) if n branches are added before a neuron.
    synchronised: in training, statistics are joint over the processes of torch.distributed as well.
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
        """The signed standard deviation lambda alpha V_th of the current, [C]."""
        return self.weight * (self.alpha * self.v_threshold)

    def forward(self, x: Tensor) -> Tensor:
        if self.synchronised and self.training and distributed.is_initialized():
            running = self.running_mean, self.running_var
            return _JointNorm.apply(x, self.scale, self.bias, *running, self.momentum, self.eps)
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
    """Keep the running statistics of tdBN and batch normalisation unchanged within a with block.

    In train mode a batch is still normalised by its own statistics, but they update the running ones with momentum 0.
    Restoring the buffers afterwards instead would invalidate every autograd graph that stored them.
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


class _JointNorm(torch.autograd.Function):
    """`F.batch_norm` in train mode over the batches of all processes; updates the running `mean` and `var` in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float
    ) -> Tensor:
        unread = torch.zeros_like(mean)  # running statistics that nothing reads
        statistics = torch.stack(torch.batch_norm_update_stats(x, unread, unread, 0.0))
        each = [torch.empty_like(statistics) for _ in range(distributed.get_world_size())]
        distributed.all_gather(each, statistics)
        means, variances = torch.stack(each).double().unbind(1)
        joint_mean = means.mean(0)
        joint_var = (variances + (means - joint_mean).square()).mean(0)
        count = len(each) * x.numel() // x.shape[1]
        mean.lerp_(joint_mean.to(mean), momentum)
        var.lerp_((joint_var * (count / (count - 1))).to(var), momentum)
        joint_mean, joint_var = joint_mean.to(mean), joint_var.to(var)
        ctx.save_for_backward(x, scale, joint_mean, joint_var)
        ctx.eps, ctx.count = eps, count
        return F.batch_norm(x, joint_mean, joint_var, scale, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, var = ctx.saved_tensors
        # first the gradient for constant statistics, then that through the statistics
        to_x, to_scale, to_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0].contiguous(memory_format=layout(x)), x, scale, mean, var, None, None, False, ctx.eps, [True] * 3
        )
        sums = torch.stack([to_bias, to_scale])
        distributed.all_reduce(sums)
        inverse = (var + ctx.eps).rsqrt()
        slope = -scale * inverse.square() * sums[1] / ctx.count
        constant = -scale * inverse * sums[0] / ctx.count - slope * mean
        shape = (1, -1, *[1] * (x.dim() - 2))
        to_x += torch.addcmul(constant.to(x).view(shape), x, slope.to(x).view(shape))
        return to_x, to_scale, to_bias, None, None, None, None


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory format of x: channels last, or contiguous for any other."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
