"""Batch normalisation by the statistics of all processes' batches together, as if they were one batch.

Every process passes the same number of images. Forward, each gathers the others' means and variances; backward, the two
sums over the batch that the gradient through the statistics needs. The gradients of scale and shift stay each process's
own share: they are averaged with those of all other parameters.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F


def joint_norm(
    x: Tensor, mean: Tensor, var: Tensor, scale: Tensor, bias: Tensor, *, momentum: float, eps: float
) -> Tensor:
    """`F.batch_norm` in training on [N, C, ...] and running statistics [C], over all processes."""
    return _JointNorm.apply(x, scale, bias, mean, var, momentum, eps)


class _JointNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float
    ) -> Tensor:
        unread = torch.zeros_like(mean)  # running statistics that are not read
        own = torch.stack(torch.batch_norm_update_stats(x, unread, unread, 0.0))
        each = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(each, own)
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
        # as if the statistics were constants; then what reaches x through them
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
    """The memory format of x, into which a gradient in another format is brought."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
