"""A torch network as an `Adaptive` target: the same forward pass, with surrogates as wide as the attacker says."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpdsgr_deploy.attacks.torch_target import Loss, cross_entropy, input_gradient
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.snn import Noise, Surrogate, Trace
from mpdsgr_deploy.snn.surrogate import triangle

UNIT = triangle(1.0)


class AdaptiveTorch:
    """`Adaptive` on tensors. noise: what a stochastic network draws from."""

    def __init__(self, model: SpikingNet, loss: Loss = cross_entropy, noise: Noise = None) -> None:
        self._model, self._loss, self._noise = copy.deepcopy(model), loss, noise

    def __call__(self, x: Tensor, y: Tensor, widths: Sequence[Tensor] | None) -> tuple[Gradient, list[Tensor]]:
        layers = self._model.layers()
        for number, layer in enumerate(layers):
            layer.neuron.stepwise = stepwise(torch.ones(1, 1) if widths is None else widths[number])
        distances: dict[str, Tensor] = {}

        def observe(trace: Trace) -> None:
            potentials = torch.stack([state.u.detach() for state in trace.states], 1)  # [B, T, ...]
            distances[trace.layer] = (potentials - trace.neuron.v_threshold).abs()

        found = input_gradient(lambda x: self._model(x, observe, self._noise), x, y, self._loss)
        return found, [distances[layer.name] for layer in layers]


def stepwise(width: Tensor) -> Callable[[int], Surrogate]:
    """Triangles of half-width g = width[:, t] in step t; width [B, T, ...], or [1, 1] for one everywhere and always."""

    def surrogate(t: int) -> Surrogate:
        g = width[:, min(t, width.shape[1] - 1)]
        return Surrogate("adaptive", lambda v: UNIT.derivative(v / g.to(v)) / g.to(v), float("inf"))

    return surrogate
