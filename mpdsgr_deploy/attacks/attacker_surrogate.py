"""The attacker chooses the surrogate: a network with the same forward pass and another backward pass.

Named as in `mpdsgr_deploy.surrogates`: the kinds of training, `straight-through` (gradient 1 everywhere), `rate` and
`pdsg`; "+detached" at the end detaches the reset, "+averaged" averages the gradient over time.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.snn import LIF, LIFState, Noise, Surrogate, make_surrogate
from mpdsgr_deploy.surrogates import DETACHED, PDSG, RATE, parse_surrogate


def with_surrogate(model: SpikingNet, name: str) -> SpikingNet:
    """A copy of `model` that answers the same and whose input gradient passes through the surrogate `name`.

    Raises InputError for an unknown name or parameter, and for detached resets of neurons that a defence changed.
    """
    attacked = copy.deepcopy(model)
    kind, _, detached, averaged = parse_surrogate(name)
    if detached and not attacked.plain:
        raise InputError(f"surrogate {name!r}: only plain LIF neurons can detach their reset; leave {DETACHED} out")
    backward: Callable[[LIF], LIF]
    if kind in (RATE, PDSG):
        backward = RateBackward if kind == RATE else SpreadBackward
    elif averaged:
        backward = partial(AveragedBackward, surrogate=make_surrogate(name))
    else:
        backward = partial(_through, surrogate=make_surrogate(name), detached=detached)
    for layer in attacked.layers():
        layer.neuron = backward(layer.neuron)
    return attacked


def _through(neuron: LIF, surrogate: Surrogate, *, detached: bool) -> LIF:
    neuron.surrogate, neuron.detach_reset = surrogate, detached
    return neuron


class OtherBackward(LIF):
    """A neuron that answers as `neuron` does, with another backward pass."""

    def __init__(self, neuron: LIF) -> None:
        super().__init__(tau=neuron.tau, v_threshold=neuron.v_threshold, reset=neuron.reset, surrogate=neuron.surrogate)
        self.inner, self.stochastic = neuron, neuron.stochastic


class PooledBackward(OtherBackward):
    """Its backward pass hands one gradient to the current of every step, and none through membrane, leak or reset."""

    def forward(
        self, current: Tensor, state: LIFState | None = None, noise: Noise = None
    ) -> tuple[Tensor, list[LIFState]]:
        with torch.no_grad():
            spikes, states = self.inner(current, state, noise)
        return _Pooled.apply(current, spikes, self.slopes(current, states)), states

    @abstractmethod
    def slopes(self, current: Tensor, states: list[LIFState]) -> Tensor:
        """What the gradient of a step's spikes is multiplied by before the mean over time, for current [T, B, ...]:
        [T, B, ...], or [B, ...] where it is the same in every step.
        """


class RateBackward(PooledBackward):
    """A neuron whose backward pass sees rates only: d rate / d mean current = [0 < mean current < V_th] / V_th.

    The gradient of the mean spike over time is handed to the current of every step alike, as if the neuron were the
    static activation clip(mean current / V_th, 0, 1) that an integrate-and-fire neuron approaches (rate gradient
    approximation attack, Bu et al., CVPR 2023).
    """

    def slopes(self, current: Tensor, states: list[LIFState]) -> Tensor:
        mean = current.mean(0)
        return ((mean > 0) & (mean < self.v_threshold)).to(mean.dtype) / self.v_threshold


class AveragedBackward(PooledBackward):
    """HART: every step's current gets mean_t(dL/dO[t] s(U[t] - V_th)), with the surrogate s.

    A wide s makes it a matter of rates, a narrow one of times; the paper searches the width of a triangle. Source: Hao
    et al., "Threaten Spiking Neural Networks through Combining Rate and Temporal Information", ICLR 2024.
    """

    def __init__(self, neuron: LIF, surrogate: Surrogate) -> None:
        super().__init__(neuron)
        self.surrogate = surrogate

    def slopes(self, current: Tensor, states: list[LIFState]) -> Tensor:
        return self.surrogate.derivative(torch.stack([state.u for state in states]) - self.v_threshold)


class SpreadBackward(OtherBackward):
    """PDSG: a surrogate as wide as a channel's potentials spread; the formula is in `attack_graph.adaptive`."""

    def forward(
        self, current: Tensor, state: LIFState | None = None, noise: Noise = None
    ) -> tuple[Tensor, list[LIFState]]:
        potentials: list[Tensor] = []  # by the time that a backward pass asks for slopes, those of all steps

        def surrogate(t: int) -> Surrogate:
            return Surrogate(PDSG, lambda v: _gaussian(v, torch.stack(potentials[: t + 1])), math.inf)

        self.inner.stepwise = surrogate
        spikes, states = self.inner(current, state, noise)
        potentials += [state.u.detach() for state in states]
        return spikes, states


def _gaussian(v: Tensor, potentials: Tensor) -> Tensor:
    """dO/dU [B, C, ...] or [B, N] from the potentials [t, B, ...] so far."""
    over = (0, *range(3, potentials.ndim)) if potentials.ndim > 3 else (0, 2)
    std = (
        torch.zeros(()) if math.prod(potentials.shape[i] for i in over) == 1 else potentials.std(over, keepdim=True)[0]
    )
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
