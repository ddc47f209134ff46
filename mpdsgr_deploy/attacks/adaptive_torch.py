"""A torch network as an `Adaptive`: the same forward pass, with surrogates that adapt (ASSG).

The formulas are those of `attack_graph.adaptive`, which is the same for exported networks.
"""

import copy
from collections.abc import Callable, Mapping
from math import pi

import torch
from torch import Tensor

from mpdsgr_deploy.attacks.torch_target import input_gradient
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.onnx_files import DEVIATION, MEAN
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.snn import Noise, Surrogate, Trace
from mpdsgr_deploy.surrogates import FLOOR, MEMORY, RELAXATION, SHARPNESS

State = Mapping[str, Tensor]


class AdaptiveTorch:
    """`Adaptive` on tensors, for images of `shape`. noise: what a stochastic network draws from."""

    def __init__(self, model: SpikingNet, shape: tuple[int, int, int], noise: Noise = None) -> None:
        self._model, self._noise = copy.deepcopy(model), noise
        self._neurons: dict[str, tuple[int, ...]] = {}  # by layer, [T, ...]

        def measure(trace: Trace) -> None:
            self._neurons[trace.layer] = (len(trace.states), *trace.states[0].u.shape[1:])

        with torch.no_grad():
            self._model(torch.zeros(1, *shape, device=model.normalize.mean.device), measure, torch.Generator())

    def start(self, count: int) -> State:
        """Return the initial state: means of 1 and deviations of 0."""
        device = self._model.normalize.mean.device
        initial = {MEAN: 1.0, DEVIATION: 0.0}
        return {
            f"{prefix}{layer}": torch.full((count, *neurons), value, device=device)
            for layer, neurons in self._neurons.items()
            for prefix, value in initial.items()
        }

    def step(self, x: Tensor, y: Tensor, state: State) -> tuple[Gradient, State]:
        """Return the gradient through surrogates whose sharpness follows the state, and the next state."""
        next_state = {name: torch.empty_like(value) for name, value in state.items()}
        for layer in self._model.layers():
            layer.neuron.stepwise = _adapting(layer.name, state, next_state)
        gradient = input_gradient(lambda x: self._model(x, None, self._noise), x, y)
        return gradient, next_state


def _adapting(layer: str, state: State, next_state: State) -> Callable[[int], Surrogate]:
    """Return a function from time step to surrogate, whose derivative writes the updated state into `next_state`."""

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
