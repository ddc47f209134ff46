"""The attacker chooses the surrogate: a network with the same forward pass and another backward pass.

Named as in `mpdsgr_deploy.surrogates`: the kinds of training, `straight-through` (gradient 1 everywhere) and `rate`;
"+detached" at the end detaches the reset.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.snn import LIF, LIFState, Noise, make_surrogate
from mpdsgr_deploy.surrogates import DETACHED, RATE, parse_surrogate


def with_surrogate(model: SpikingNet, name: str) -> SpikingNet:
    """A copy of `model` that answers the same and whose input gradient passes through the surrogate `name`.

    Raises InputError for an unknown name or parameter, and for detached resets of neurons that a defence changed.
    """
    attacked = copy.deepcopy(model)
    kind, _, detached = parse_surrogate(name)
    if detached and any(type(layer.neuron) is not LIF for layer in attacked.layers()):
        raise InputError(f"surrogate {name!r}: only plain LIF neurons can detach their reset; leave {DETACHED} out")
    if kind == RATE:
        for layer in attacked.layers():
            layer.neuron = RateBackward(layer.neuron)
        return attacked
    surrogate = make_surrogate(name)
    for layer in attacked.layers():
        layer.neuron.surrogate, layer.neuron.detach_reset = surrogate, detached
    return attacked


class RateBackward(LIF):
    """A neuron whose backward pass sees rates only: d rate / d mean current = [0 < mean current < V_th] / V_th.

    The gradient of the mean spike over time is handed to the current of every step alike, as if the neuron were the
    static activation clip(mean current / V_th, 0, 1) that an integrate-and-fire neuron approaches (rate gradient
    approximation attack, Bu et al., CVPR 2023). No gradient passes through membrane, leak or reset.
    """

    def __init__(self, neuron: LIF) -> None:
        super().__init__(tau=neuron.tau, v_threshold=neuron.v_threshold, reset=neuron.reset, surrogate=neuron.surrogate)
        self.inner, self.stochastic = neuron, neuron.stochastic

    def forward(
        self, current: Tensor, state: LIFState | None = None, noise: Noise = None
    ) -> tuple[Tensor, list[LIFState]]:
        with torch.no_grad():
            spikes, states = self.inner(current, state, noise)
        return _Rate.apply(current, spikes, self.v_threshold), states


class _Rate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, spikes: Tensor, v_threshold: float) -> Tensor:
        mean = current.mean(0)
        ctx.save_for_backward((mean > 0) & (mean < v_threshold))
        ctx.v_threshold = v_threshold
        return spikes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (responsive,) = ctx.saved_tensors
        gradient = grads[0].mean(0) * responsive / ctx.v_threshold
        return gradient.expand_as(grads[0]), None, None
