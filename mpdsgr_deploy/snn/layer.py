"""A layer of spiking neurons, and how its membrane potentials are observed.

An observer is an argument of `forward`, called once a layer with a `Trace`: the regulariser and the diagnostics
see the membrane without hooks and without state left behind in the modules.
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
    """What one layer did in one forward pass: its T states, each u and spikes [B, C, ...], and the current
    [T, B, C, ...] that drove them (kept anyway: at rest the first u is a view of it).

    Where a GPU ran plain neurons in one kernel with their normalisation, the current was never written and is None, but
    the potential's moments came along.
    """

    layer: str
    norm: nn.Module | None
    neuron: LIF
    states: list[LIFState]
    current: Tensor | None
    moments: StepMoments | None = None


Observer = Callable[[Trace], None]


class Reader:
    """An observer that keeps of a trace what it reads there, so that the layer's tensors need not outlive the layer.

    A layer that is computed again on the way back is read again, so that its gradient finds what it needs, but nothing
    is kept a second time: `read` may have no other effect.
    """

    def __init__(self, read: Callable[[Trace], Any], keep: Callable[[Any], None]) -> None:
        self.read, self.keep = read, keep

    def __call__(self, trace: Trace) -> None:
        self.keep(self.read(trace))


def fold_time(stateless: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function without state to [T, B, ...] as one batch [T*B, ...]."""
    return stateless(x.flatten(0, 1)).unflatten(0, (x.shape[0], -1))


class Temporal(nn.Module):
    """A module that sees all T steps at once, because it has a state over time or contains something that has."""

    def forward(self, x: Tensor, observe: Observer | None = None, noise: Noise = None) -> Tensor:
        """[T, B, ...] to [T, B, ...]. Observers and noise are handed to every neuron inside."""
        raise NotImplementedError


class SpikingLayer(Temporal):
    """synapse (convolution or linear) -> normalisation if there is one -> LIF.

    A pre-activation layer, which normalises what reaches it, has nn.Identity as its synapse.
    """

    def __init__(self, name: str, synapse: nn.Module, norm: nn.Module | None, neuron: LIF) -> None:
        super().__init__()
        self.name, self.synapse, self.norm, self.neuron = name, synapse, norm, neuron

    def current(self, x: Tensor) -> Tensor:
        """Return the neurons' current [B, C, ...] from spikes or encoded input of one step [B, ...]."""
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
        """What runs normalisation and neurons at once, if that is possible here."""
        norm, neuron = self.norm, self.neuron
        # the kernel sees only the batch of one process
        fits = norm is None or (type(norm) is TdBN and not norm.synchronised)
        plain = fits and type(neuron) is LIF and neuron.stepwise is None
        return gpu_kernels(x, self.neuron.tau, self.neuron.surrogate) if plain else None

    def _in_one_kernel(self, kernels: Any, received: Tensor, observe: Observer | None) -> Tensor:
        neuron = self.neuron
        steps = neuron.hold if len(received) == 1 else len(received)
        constants = neuron.constants(steps)
        seen = observe is not None
        spikes, u, moments = kernels.norm_lif(received, self.norm, constants, potentials=seen, moments=seen)
        if observe is not None:
            states = [LIFState(*both) for both in zip(u, spikes, strict=True)]
            observe(Trace(self.name, self.norm, neuron, states, None, moments))
        return spikes
