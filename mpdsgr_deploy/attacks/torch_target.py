"""Input gradients of a torch model: backpropagation through all T steps, with fixed or adaptive (ASSG) surrogates.

`attack_graph.adaptive` gives the formulas of ASSG and implements them for exported networks.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.onnx_files import DEVIATION, MEAN
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.snn import Noise, Surrogate, Trace
from mpdsgr_deploy.surrogates import FLOOR, MEMORY, RELAXATION, SHARPNESS

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, K] and classes [B] (or weights [B, K]) to losses [B]
State = Mapping[str, Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log softmax of the true class [B], for logits [B, K] and classes y [B]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the largest wrong logit minus the true one [B]; positive if the network is fooled, 0 for K = 1."""
    if logits.shape[1] == 1:
        return 0 * logits[:, 0]
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - true


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio [B]: `margin` divided by the largest minus the third largest logit.

    It is positive if the network is fooled, and invariant to the scale of the logits. It needs three classes; with
    fewer, it is the margin. `attack_graph.derive` builds the same loss from ONNX nodes. Source: Croce & Hein,
    arXiv 2003.01690.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, y) / (first - third + 1e-12)


def weighted(logits: Tensor, weights: Tensor) -> Tensor:
    """Return weights . logits [B], for losses whose gradient in the logits, weights [B, K], is computed elsewhere."""
    return (weights * logits).sum(1)


def input_gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Gradient:
    """Return logits, the loss of each image and its gradient in x [B, C, H, W]; weights get no gradient."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x).float()
        per_sample = loss(logits, y)
        (gradient,) = torch.autograd.grad(per_sample.sum(), x)
    return Gradient(logits.detach(), per_sample.detach(), gradient)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the network in eval mode, without gradients of its parameters, for the duration of a with block."""
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


class AdaptiveTorch:
    """An `Adaptive` for tensors, whose images have `shape` (C, H, W). noise: the generator of a stochastic network."""

    def __init__(self, model: SpikingNet, shape: tuple[int, int, int], noise: Noise = None) -> None:
        self._model, self._noise = copy.deepcopy(model), noise
        self._neurons: dict[str, tuple[int, ...]] = {}  # shape [T, ...] of each layer's potentials

        def measure(trace: Trace) -> None:
            self._neurons[trace.layer] = (len(trace.states), *trace.states[0].u.shape[1:])

        with torch.no_grad():
            self._model(torch.zeros(1, *shape, device=model.normalize.mean.device), measure, torch.Generator())

    def start(self, count: int) -> State:
        """Return the initial state for `count` images: means of 1 and deviations of 0."""
        device = self._model.normalize.mean.device
        initial = {MEAN: 1.0, DEVIATION: 0.0}
        return {
            f"{prefix}{layer}": torch.full((count, *neurons), value, device=device)
            for layer, neurons in self._neurons.items()
            for prefix, value in initial.items()
        }

    def step(self, x: Tensor, y: Tensor, state: State) -> tuple[Gradient, State]:
        """Return the gradient through surrogates whose sharpness depends on the state, and the next state."""
        next_state = {name: torch.empty_like(value) for name, value in state.items()}
        for layer in self._model.layers():
            layer.neuron.stepwise = _adapting(layer.name, state, next_state)
        gradient = input_gradient(lambda x: self._model(x, None, self._noise), x, y)
        return gradient, next_state


def _adapting(layer: str, state: State, next_state: State) -> Callable[[int], Surrogate]:
    """Return a function from time step to surrogate, whose derivative writes the new state to `next_state`."""

    def surrogate(t: int) -> Surrogate:
        def derivative(v: Tensor) -> Tensor:
            mean, deviation = (state[f"{prefix}{layer}"][:, t] for prefix in (MEAN, DEVIATION))
            mean = MEMORY * mean + (1 - MEMORY) * v.abs()
            deviation = MEMORY * deviation + (1 - MEMORY) * (v.abs() - mean).abs()
            next_state[f"{MEAN}{layer}"][:, t], next_state[f"{DEVIATION}{layer}"][:, t] = mean, deviation
            sharpness = SHARPNESS / (mean + RELAXATION * deviation + FLOOR)
            return sharpness / 2 / (1 + (pi / 2 * sharpness * v) ** 2)

        return Surrogate("adaptive", derivative, float("inf"))

    return surrogate
