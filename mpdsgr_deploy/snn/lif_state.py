"""The constants of LIF neurons, their state, and the moments of their potentials."""

from typing import NamedTuple

from torch import Tensor

from mpdsgr_deploy.snn.surrogate import Surrogate


class LIFConstants(NamedTuple):
    """The constants of LIF neurons over `steps` = T time steps; the equations are in `mpdsgr_deploy.snn.neuron`.

    tau: one leak for all steps, or a tensor [T, ...] of one leak per step, broadcast over the batch. hard: whether the
    reset is hard; otherwise it is soft. detach_reset: the reset passes no gradient to spikes.
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
    """Moments of the potential U per step and channel, each float32 [T, C].

    variance: the mean squared deviation over the batch. removed: the mean amount by which the reset after the step
    lowers the potential; it has no gradient.
    """

    mean: Tensor
    variance: Tensor
    removed: Tensor
