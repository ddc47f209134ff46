"""A layer of spiking neurons, and how its membrane potentials are observed.

An observer is an argument of `forward`, which is called once per layer with a `Trace`. The regulariser and the
diagnostics thus read membrane potentials without hooks, and modules store no state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from mpdsgr_deploy.snn.draws import Noise
from mpdsgr_deploy.snn.lif_state import LIFState, StepMoments
from mpdsgr_deploy.snn.multistep import gpu_kernels
from mpdsgr_deploy.snn.neuron import LIF
from mpdsgr_deploy.snn.tdbn import TdBN


class Trace(NamedTuple):
    """The values of one layer in one forward pass.

    states: the T states, each u and spikes [B, C, ...]. current: the input current [T, B, C, ...] of the neurons; it
    takes no additional memory, since at rest the first u is a view of it.

    If a GPU ran neurons and normalisation in one kernel, the current was never written and is None, and moments has the
    moments of the potentials.
    """

    layer: str
    norm: nn.Module | None
    neuron: LIF
    states: list[LIFState]
    current: Tensor | None
    moments: StepMoments | None = None


Observer = Callable[[Trace], None]


class Reader:
    """An observer that stores only the result of `read`, so that the tensors of a layer can be freed after the layer.

    A layer that is recomputed in the backward pass is also read again, because its gradient needs that, but the result
    is passed to `keep` only once. `read` must have no other effect than its result.
    """

    def __init__(self, read: Callable[[Trace], Any], keep: Callable[[Any], None]) -> None:
        self.read, self.keep = read, keep

    def __call__(self, trace: Trace) -> None:
        self.keep(self.read(trace))


def fold_time(stateless: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function without state to [T, B, ...] as one batch [T*B, ...]."""
    return stateless(x.flatten(0, 1)).unflatten(0, (x.shape[0], -1))


class Temporal(nn.Module):
    """A module that processes all T steps at once, because it or a part of it has a state over time."""

    def forward(self, x: Tensor, observe: Observer | None = None, noise: Noise = None) -> Tensor:
        """Map [T, B, ...] to [T, B, ...], passing the observer and the noise to every neuron inside."""
        raise NotImplementedError


class SpikingLayer(Temporal):
    """A synapse (convolution or linear layer), an optional normalisation, and LIF neurons.

    A pre-activation layer, which normalises its input, has nn.Identity as its synapse.
    """

    def __init__(self, name: str, synapse: nn.Module, norm: nn.Module | None, neuron: LIF) -> None:
        super().__init__()
        self.name, self.synapse, self.norm, self.neuron = name, synapse, norm, neuron

    def current(self, x: Tensor) -> Tensor:
        """Return the neurons' input current [B, C, ...] for spikes or encoded input of one step [B, ...]."""
        current = self.synapse(x)
        return current if self.norm is None else self.norm(current)

    def forward(self, x: Tensor, observe: Observer | None = None, noise: Noise = None) -> Tensor:
        """Map spikes or encoded input [T, B, ...] to spikes [T, B, C, ...]."""
        kernels = self._kernels(x)
        if kernels is not None:
            return self._in_one_kernel(kernels, fold_time(self.synapse, x), observe)
        current = fold_time(self.current, x)
        spikes, states = self.neuron(current, noise=noise)
        if observe is not None:
            observe(Trace(self.name, self.norm, self.neuron, states, current))
        return spikes

    def _kernels(self, x: Tensor) -> Any:
        """Return the module with GPU kernels for normalisation and neurons; None if it does not support this layer."""
        norm, neuron = self.norm, self.neuron
        # a kernel computes statistics only over the batch of its own process
        fits = norm is None or (type(norm) is TdBN and not norm.synchronised)
        plain = fits and type(neuron) is LIF and neuron.stepwise is None
        return gpu_kernels(x, self.neuron.tau, self.neuron.surrogate) if plain else None

    def _in_one_kernel(self, kernels: Any, received: Tensor, observe: Observer | None) -> Tensor:
        neuron = self.neuron
        steps = neuron.hold if len(received) == 1 else len(received)
        constants = neuron.constants(steps)
        spikes, u, moments = kernels.norm_lif(received, self.norm, constants, observed=observe is not None)
        if observe is not None:
            states = [LIFState(*both) for both in zip(u, spikes, strict=True)]
            observe(Trace(self.name, self.norm, neuron, states, None, moments))
        return spikes
