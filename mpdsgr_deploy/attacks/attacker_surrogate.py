"""Attack a torch network through another surrogate than it was trained with: same forward pass, other backward pass.

Surrogates have the names of `mpdsgr_deploy.surrogates`: the kinds that training uses, `straight-through` (gradient 1
everywhere), `rate` and `pdsg`. The suffix "+detached" detaches the reset, "+averaged" averages the gradient axes time.
"""

import copy
import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.snn import LIF, LIFState, Noise, Surrogate, make_surrogate
from mpdsgr_deploy.surrogates import DETACHED, PDSG, RATE, parse_surrogate


def with_surrogate(model: SpikingNet, name: str) -> SpikingNet:
    """Return a copy of `model` with the same logits, whose input gradient passes through the surrogate `name`.

    Raises InputError for an unknown name or parameter, and for a name with "+detached" if a defence changed the
    neurons.
    """
    attacked = copy.deepcopy(model)
    kind, _, detached, averaged = parse_surrogate(name)
    if detached and not attacked.plain:
        raise InputError(f"surrogate {name!r}: only plain LIF neurons can detach their reset; leave {DETACHED} out")
    for layer in attacked.layers():
        if kind == RATE:
            layer.neuron = RateBackward(layer.neuron)
        elif kind == PDSG:
            layer.neuron = SpreadBackward(layer.neuron)
        elif averaged:
            layer.neuron = AveragedBackward(layer.neuron, make_surrogate(name))
        else:
            layer.neuron.surrogate, layer.neuron.detach_reset = make_surrogate(name), detached
    return attacked


class OtherBackward(LIF):
    """A neuron with the spikes of `neuron` and another backward pass."""

    def __init__(self, neuron: LIF) -> None:
        super().__init__(tau=neuron.tau, v_threshold=neuron.v_threshold, reset=neuron.reset, surrogate=neuron.surrogate)
        self.inner, self.stochastic = neuron, neuron.stochastic


class PooledBackward(OtherBackward):
    """Give the currents of all steps the same gradient, and pass none through membrane, leak or reset."""

    def forward(
        self, current: Tensor, state: LIFState | None = None, noise: Noise = None
    ) -> tuple[Tensor, list[LIFState]]:
        with torch.no_grad():
            spikes, states = self.inner(current, state, noise)
        return _Pooled.apply(current, spikes, self.slopes(current, states)), states

    @abstractmethod
    def slopes(self, current: Tensor, states: list[LIFState]) -> Tensor:
        """Return the factors of the spikes' gradients [T, B, ...], applied before the mean axes time.

        current: [T, B, ...]. The result is [T, B, ...], or [B, ...] if all steps have the same factor.
        """


class RateBackward(PooledBackward):
    """Differentiate firing rates: d rate / d mean current = [0 < mean current < V_th] / V_th.

    The current of every step gets the gradient of the mean axes time, as if the neuron were the static activation
    clip(mean current / V_th, 0, 1), which an integrate-and-fire neuron approximates.

    Source: rate gradient approximation attack, Bu et al., CVPR 2023.
    """

    def slopes(self, current: Tensor, states: list[LIFState]) -> Tensor:
        mean = current.mean(0)
        return ((mean > 0) & (mean < self.v_threshold)).to(mean.dtype) / self.v_threshold


class AveragedBackward(PooledBackward):
    """HART: give the current of every step the gradient mean_t(dL/dO[t] s(U[t] - V_th)), with the surrogate s.

    With a wide s the gradient depends on firing rates, with a narrow one on spike times; the paper searches the width
    of a triangular s. Source: Hao et al., "Threaten Spiking Neural Networks through Combining Rate and Temporal
    Information", ICLR 2024.
    """

    def __init__(self, neuron: LIF, surrogate: Surrogate) -> None:
        super().__init__(neuron)
        self.surrogate = surrogate

    def slopes(self, current: Tensor, states: list[LIFState]) -> Tensor:
        return self.surrogate.derivative(torch.stack([state.u for state in states]) - self.v_threshold)


class SpreadBackward(OtherBackward):
    """PDSG: a Gaussian surrogate with the standard deviation of the channel's membrane potentials.

    The module `attack_graph.adaptive` has the formula.
    """

    def forward(
        self, current: Tensor, state: LIFState | None = None, noise: Noise = None
    ) -> tuple[Tensor, list[LIFState]]:
        potentials: list[Tensor] = []  # filled after the forward pass, before a backward pass reads it

        def surrogate(t: int) -> Surrogate:
            return Surrogate(PDSG, lambda v: _gaussian(v, torch.stack(potentials[: t + 1])), math.inf)

        self.inner.stepwise = surrogate
        spikes, states = self.inner(current, state, noise)
        potentials += [state.u.detach() for state in states]
        return spikes, states


def _gaussian(v: Tensor, potentials: Tensor) -> Tensor:
    """Return dO/dU [B, C, ...] or [B, N] at v = U - V_th, from the potentials [t, B, ...] of steps 1 to t."""
    axes = (0, *range(3, potentials.ndim)) if potentials.ndim > 3 else (0, 2)
    alone = math.prod(potentials.shape[i] for i in axes) == 1
    std = torch.zeros(()) if alone else potentials.std(axes, keepdim=True)[0]
    s = torch.where(std > 0, std, 1.0)
    return torch.exp(-((v / s - 0.5) ** 2) / 2) / (s * math.sqrt(2 * math.pi))


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, spikes: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        return spikes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (grads[0] * slopes).mean(0).expand_as(grads[0]), None, None
