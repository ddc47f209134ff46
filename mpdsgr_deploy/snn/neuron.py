"""The leaky integrate-and-fire (LIF) neuron. Its state is an argument and a result; modules store none.

    hard reset   U_t = tau U_{t-1} (1 - O_{t-1}) + I_t
    soft reset   U_t = tau (U_{t-1} - V_th O_{t-1}) + I_t
    spike        O_t = [U_t >= V_th]

with U_0 = O_0 = 0. The reset is applied before the leak, as in SNN-RAT and the papers that build on it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mpdsgr_deploy.snn.draws import Noise
from mpdsgr_deploy.snn.lif_state import LIFConstants, LIFState
from mpdsgr_deploy.snn.multistep import multistep_lif
from mpdsgr_deploy.snn.surrogate import Surrogate, spike

Reset = Literal["hard", "soft"]


def lif_step(
    current: Tensor,
    state: LIFState | None,
    *,
    tau: float | Tensor,
    v_threshold: float,
    reset: Reset,
    surrogate: Surrogate,
) -> LIFState:
    """Return the state after one time step with current I_t [B, ...]; state: the one before, None at rest."""
    if state is None:
        u = current  # no zeros_like: keeps Shape/Expand nodes out of the exported graph
    elif reset == "hard":
        u = tau * state.u * (1 - state.spikes) + current
    else:
        u = tau * (state.u - v_threshold * state.spikes) + current
    return LIFState(u, spike(u, v_threshold, surrogate))


def lif(
    current: Sequence[Tensor],
    state: LIFState | None = None,
    *,
    tau: float | Tensor,
    v_threshold: float,
    reset: Reset,
    surrogate: Surrogate | Callable[[int], Surrogate],
) -> list[LIFState]:
    """Return the T states after time steps with T currents [B, ...]; pass the last one as `state` to continue.

    tau: one leak for all steps, or a tensor [T, ...] whose tau[t] is the leak of step t, broadcast over the batch.
    surrogate: one for all steps, or a function from t, counted from 0, to the surrogate of step t.
    """
    states = []
    for t, step in enumerate(current):
        leak = tau[t].to(step) if isinstance(tau, Tensor) else tau  # to: the current's dtype under mixed precision
        step_surrogate = surrogate(t) if callable(surrogate) else surrogate
        state = lif_step(step, state, tau=leak, v_threshold=v_threshold, reset=reset, surrogate=step_surrogate)
        states.append(state)
    return states


class LIF(nn.Module):
    """A module with the constants of `lif`, without parameters and state. Defences derive their neurons from it.

    tau in (0, 1]: the share of the potential that is left after a step. v_threshold > 0: the firing threshold V_th.
    detach_reset: the reset passes no gradient to spikes.
    """

    time_invariant: bool = True  # whether all steps have the same leak and input gain, as Theorem 1 assumes
    per_step: tuple[str, ...] = ()  # names of parameters [T, ...] with one value per step
    stochastic: bool = False  # whether it draws from `noise`
    binary: bool = True  # whether its outputs are only 0 and 1
    hold: int = 1  # number of steps that a current [1, B, ...] lasts
    # set by an attacker: a function from t to the surrogate that replaces `surrogate` in step t
    stepwise: Callable[[int], Surrogate] | None = None

    def __init__(
        self,
        *,
        tau: float = 0.5,
        v_threshold: float = 1.0,
        reset: Reset = "hard",
        surrogate: Surrogate,
        detach_reset: bool = False,
    ) -> None:
        super().__init__()
        self.tau, self.v_threshold, self.reset, self.surrogate = tau, v_threshold, reset, surrogate
        self.detach_reset = detach_reset

    @property
    def leak(self) -> float | Tensor:
        """The tau of `lif`: a number, or a tensor [T, ...] in neurons that learn it."""
        return self.tau

    def constants(self, steps: int) -> LIFConstants:
        """Return the constants of the neurons for `steps` time steps."""
        hard = self.reset == "hard"
        return LIFConstants(steps, self.leak, self.v_threshold, hard, self.surrogate, self.detach_reset)

    def forward(
        self, current: Tensor, state: LIFState | None = None, noise: Noise = None
    ) -> tuple[Tensor, list[LIFState]]:
        """Return spikes [T, B, ...] and the T states for a current [T, B, ...].

        A current [1, B, ...] is used for `hold` steps.
        """
        steps = current.unbind(0)
        if torch.is_grad_enabled() and self.stepwise is None:
            count = self.hold if len(steps) == 1 else len(steps)
            potentials, spikes = multistep_lif(current, state, self.constants(count))
            return spikes, [LIFState(*both) for both in zip(potentials, spikes, strict=True)]
        states = lif(
            steps * self.hold if len(steps) == 1 else steps,
            state,
            tau=self.leak,
            v_threshold=self.v_threshold,
            reset=self.reset,
            surrogate=self.stepwise or self.surrogate,
        )
        return torch.stack([s.spikes for s in states]), states

    def extra_repr(self) -> str:
        return f"tau={self.tau}, v_threshold={self.v_threshold}, reset={self.reset}, surrogate={self.surrogate.name}"


class DerivedLIF(LIF):
    """The base of a defence's neurons: it copies the constants of `lif`, and subclasses add learned parameters.

    A subclass whose outputs are only 0 and 1 sets `binary = True`; its spikes are then stored in one byte each for the
    backward pass.
    """

    binary = False

    def __init__(self, lif: LIF) -> None:
        super().__init__(tau=lif.tau, v_threshold=lif.v_threshold, reset=lif.reset, surrogate=lif.surrogate)
