"""Input gradients of a torch model: backpropagation through all T steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpdsgr_deploy.protocols import Gradient

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, K] and classes [B] (or weights [B, K]) to losses [B]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax of the true class [B]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus the true one [B]: positive once the network is fooled. 0 where there is one class."""
    if logits.shape[1] == 1:
        return 0 * logits[:, 0]
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - true


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio [B] (Croce & Hein, arXiv 2003.01690): the margin over the spread of the top three.

    Positive once the network is fooled; scaling the logits does not change it. It needs three classes: with fewer it is
    the margin. `attack_graph.losses` has the same as ONNX nodes.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, y) / (first - third + 1e-12)


def weighted(logits: Tensor, weights: Tensor) -> Tensor:
    """weights . logits [B], for losses whose gradient in the logits is computed elsewhere; weights [B, K]."""
    return (weights * logits).sum(1)


def input_gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Gradient:
    """The loss of each sample on the network's logits, and its gradient in x; no weight gradient is computed."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x).float()
        per_sample = loss(logits, y)
        (gradient,) = torch.autograd.grad(per_sample.sum(), x)
    return Gradient(logits.detach(), per_sample.detach(), gradient)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep the network in eval mode, without gradients of its parameters, for the length of a with block."""
    training, learned = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for p in learned:
            p.requires_grad_(True)
