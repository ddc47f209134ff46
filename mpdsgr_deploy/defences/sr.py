"""Sparsity regularisation of the input gradient (SR; Liu et al., "Enhancing Adversarial Robustness in SNNs with Sparse
Gradients", ICML 2024).

    lam * mean over the images of ((f(x + h v) - f(x)) / h)^2,   v = sign(grad_x f),   f = e^z_y / (e^z_y + e^z_j)

with y the true class and j the best wrong one. The finite difference along v stands for the gradient's 1-norm.
"""

import torch
from torch import Tensor

from mpdsgr_deploy.defences.base import Defence, Step, Term, register
from mpdsgr_deploy.schema import NonNegative, Positive, Section


class SparseGradientSettings(Section):
    """The weight lam, and the length h of the finite difference in pixel units."""

    lam: NonNegative = 0.002
    h: Positive = 0.01


@register("sr", SparseGradientSettings)
class SparseGradients(Defence[SparseGradientSettings]):
    """Two forward passes more a step: one for v, of which only the input gradient is computed, and one at x + h v.

    Both run in train mode, normalised by their own batch, as in the authors' code: f(x) is taken from the step's
    logits, and next to a pass in eval mode the difference of the modes, divided by h, would drown the derivative.
    `Step.forward` keeps both out of the running statistics.
    """

    def term(self, step: Step) -> Term:
        h, x = self.settings.h, step.x.detach().requires_grad_()
        # chosen only at x, so that f is the same function at x and at the attacked image
        rival = best_wrong(step.logits, step.y)
        (gradient,) = torch.autograd.grad(confidence(step.forward(x, None), step.y, rival).sum(), x)
        here = confidence(step.logits, step.y, rival)
        there = confidence(step.forward(step.x + h * gradient.sign(), None), step.y, rival)
        return Term("sparsity", self.settings.lam, ((there - here) / h).square().mean())


def best_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Return the class [B] other than y [B] with the largest of the logits [B, K]."""
    return logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)


def confidence(logits: Tensor, y: Tensor, rival: Tensor) -> Tensor:
    """Return f [B]: the softmax over class y and class `rival` alone."""
    true, other = (logits.gather(1, k[:, None]).squeeze(1) for k in (y, rival))
    return torch.sigmoid(true - other)
