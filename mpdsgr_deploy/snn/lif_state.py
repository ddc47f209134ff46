"""The constants of LIF neurons, their state, and what a layer of them hands on besides its spikes."""

from typing import NamedTuple

from torch import Tensor

from mpdsgr_deploy.snn.surrogate import Surrogate


class LIFConstants(NamedTuple):
    """What LIF neurons do over `steps` = T time steps; the equations are in `mpdsgr_deploy.snn.neuron`.

    tau: one leak, or a tensor [T, ...] of each step's, broadcast over the batch. hard: the reset; else it is soft.
    detach_reset: no gradient passes through the spikes that reset.
    """

    steps: int
    tau: float | Tensor
    v_threshold: float
    hard: bool
    surrogate: Surrogate
    detach_reset: bool = False


class LIFState(NamedTuple):
    """Membrane potential u and spikes [B, ...] after a time step."""

    u: Tensor
    spikes: Tensor


class StepMoments(NamedTuple):
    """Moments of the potential U, per step and channel, float32 [T, C]: mean, variance (of the batch: divided by the
    number of elements), and the mean of what the reset after the step takes away, which carries no gradient.
    """

    mean: Tensor
    variance: Tensor
    removed: Tensor
