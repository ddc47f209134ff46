"""Sparsity regularisation of the input gradient (SR; Liu et al., "Enhancing Adversarial Robustness in SNNs with Sparse
Gradients", ICML 2024).

    lam * mean over the images of ((f(x + h v) - f(x)) / h)^2,   v = sign(grad_x f),   f = e^z_y / (e^z_y + e^z_j)

where y is the true class and j the wrong class of the largest logit. The finite difference along v approximates the
1-norm of the gradient.
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
    """Add the term to the loss, which takes two more forward passes per step: one for v, and one at x + h v.

    Both passes run in train mode, normalised by their own batch, as in the authors' code. f(x) comes from the logits of
    the step; if the other passes ran in eval mode, the difference between the modes, divided by h, would dominate the
    derivative. `Step.forward` keeps both passes out of the running statistics.
    """

    def term(self, step: Step) -> Term:
        h, x = self.settings.h, step.x.detach().requires_grad_()
        # chosen only at x, so that f is the same function at x and at x + h v
        rival = best_wrong(step.logits, step.y)
        (gradient,) = torch.autograd.grad(confidence(step.forward(x, None), step.y, rival).sum(), x)
        here = confidence(step.logits, step.y, rival)
        there = confidence(step.forward(step.x + h * gradient.sign(), None), step.y, rival)
        return Term("sparsity", self.settings.lam, ((there - here) / h).square().mean())


def best_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Return the wrong class [B] of the largest logit, for logits [B, K] and true classes y [B]."""
    return logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)


def confidence(logits: Tensor, y: Tensor, rival: Tensor) -> Tensor:
    """Return f [B]: the probability of class y in a softmax over the classes y and `rival` only."""
    true, other = (logits.gather(1, k[:, None]).squeeze(1) for k in (y, rival))
    return torch.sigmoid(true - other)
