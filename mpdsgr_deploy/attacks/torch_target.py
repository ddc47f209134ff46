"""Input gradients of a torch model: backpropagation through all T steps with the training surrogate."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mpdsgr_deploy.protocols import Gradient


def input_gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Gradient:
    """Cross-entropy of each sample on the time-mean logits, and its gradient in x; no weight gradient is computed."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x).float()
        loss = F.cross_entropy(logits, y, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return Gradient(logits.detach(), loss.detach(), gradient)
