"""All T steps of LIF neurons as one node of autograd's graph: the steps of `lif`, to the bit, forward and backward.

Step by step autograd keeps the potential before the reset, what the reset left, the spikes and the surrogate's input of
every step; here the potentials alone are kept, from which all the rest follows. With

    hard   U_t = tau_t U_{t-1} (1 - O_{t-1}) + I_t          soft   U_t = tau_t (U_{t-1} - V_th O_{t-1}) + I_t

the gradient d_t of the loss in U_t, from the last step back, is

    hard   d_t = gU_t + tau_{t+1} d_{t+1} (1 - O_t) + (gO_t - tau_{t+1} d_{t+1} U_t) s(U_t - V_th)
    soft   d_t = gU_t + tau_{t+1} d_{t+1}           + (gO_t - tau_{t+1} d_{t+1} V_th) s(U_t - V_th)

where gU and gO are what reaches potentials and spikes from elsewhere and s is the surrogate. A detached reset, one
whose spikes pass no gradient on, leaves out the term after gO_t.
"""

from functools import cache
from math import frexp
from typing import Any

import torch
from torch import Tensor

from mpdsgr_deploy.snn.state import LIFConstants
from mpdsgr_deploy.snn.surrogate import Surrogate


def multistep_lif(
    current: Tensor, state: tuple[Tensor, Tensor] | None, constants: LIFConstants
) -> tuple[Tensor, Tensor]:
    """Potentials and spikes [T, B, ...] of `constants.steps` = T steps.

    current [T, B, ...], or [1, B, ...], which then lasts for all steps. state: potential and spikes [B, ...] before
    them, None at rest. A GPU runs the kernels of `triton_lif` where they know the case.
    """
    steps, tau, v_threshold, hard, surrogate, detach_reset = constants
    kernels = gpu_kernels(current, tau, surrogate)
    if kernels is not None:
        potentials, spikes = kernels.triton_lif(current, state, constants)
        return potentials, spikes
    before = (None, None) if state is None else state
    leaks = tau.to(current) if isinstance(tau, Tensor) else tau
    u, spikes = _MultiStep.apply(current, *before, leaks, steps, v_threshold, hard, surrogate, detach_reset)
    return u, spikes


def gpu_kernels(x: Tensor, tau: float | Tensor, surrogate: Surrogate) -> Any:
    """The module `triton_lif` if x is on a GPU and it knows the case; else None."""
    kernels = _triton_lif() if _on_gpu(x) else None
    return kernels if kernels is not None and kernels.takes(x, tau, surrogate) else None


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


@cache
def _triton_lif() -> Any:
    """None without Triton, which torch brings along only where it is built for GPUs."""
    try:
        from mpdsgr_deploy.snn import triton_lif
    except ImportError:
        return None
    return triton_lif


class _MultiStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        u_before: Tensor | None,
        spikes_before: Tensor | None,
        tau: float | Tensor,
        steps: int,
        v_threshold: float,
        hard: bool,
        surrogate: Surrogate,
        detach_reset: bool,
    ) -> tuple[Tensor, Tensor]:
        held = len(current) < steps
        u = current.new_empty((steps, *current.shape[1:])) if held else torch.empty_like(current)
        spikes = torch.empty_like(u)
        last_u, last_spikes = u_before, spikes_before
        for t in range(steps):
            now = current[0 if held else t]
            if last_u is None or last_spikes is None:
                u[t].copy_(now)
            elif hard and not isinstance(tau, Tensor) and _exact(tau, u.dtype):
                torch.addcmul(now, last_u, _silent(last_u, v_threshold) if t else 1 - last_spikes, value=tau, out=u[t])
            else:
                torch.mul(_left(last_u, last_spikes, v_threshold, hard), _leak(tau, t), out=u[t]).add_(now)
            torch.ge(u[t], v_threshold, out=spikes[t])
            last_u, last_spikes = u[t], spikes[t]
        ctx.save_for_backward(u, u_before, spikes_before, tau if isinstance(tau, Tensor) else None)
        ctx.tau, ctx.v_threshold, ctx.hard, ctx.surrogate, ctx.held = tau, v_threshold, hard, surrogate, held
        ctx.detach_reset = detach_reset
        ctx.set_materialize_grads(False)
        return u, spikes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_u, grad_spikes = grads
        u, u_before, spikes_before, leaks = ctx.saved_tensors
        tau = ctx.tau if leaks is None else leaks
        v_threshold, hard = ctx.v_threshold, ctx.hard
        to_current = torch.zeros_like(u[:1]) if ctx.held else torch.empty_like(u)
        to_tau = torch.zeros_like(leaks) if leaks is not None and ctx.needs_input_grad[3] else None
        later: Tensor | None = None  # tau_{t+1} d_{t+1}
        for t in reversed(range(len(u))):
            d = torch.empty_like(u[t]) if ctx.held else to_current[t]
            if later is not None and not ctx.detach_reset:
                torch.mul(later, u[t] if hard else v_threshold, out=d)
                d = d.neg_() if grad_spikes is None else torch.sub(grad_spikes[t], d, out=d)
                d.mul_(ctx.surrogate.derivative(u[t] - v_threshold))
            elif grad_spikes is not None:
                torch.mul(grad_spikes[t], ctx.surrogate.derivative(u[t] - v_threshold), out=d)
            else:
                d.zero_()
            if later is not None:
                d = d.addcmul_(later, _silent(u[t], v_threshold)) if hard else d.add_(later)
            if grad_u is not None:
                d.add_(grad_u[t])
            if ctx.held:
                to_current[0].add_(d)
            first = u_before if t == 0 else u[t - 1]
            if first is None:
                break
            if to_tau is not None:
                fired = spikes_before if t == 0 else (u[t - 1] >= v_threshold).to(u.dtype)
                to_tau[t] = (d * _left(first, fired, v_threshold, hard)).sum(0).sum_to_size(leaks[t].shape)
            later = _leak(tau, t) * d
        to_u = to_spikes = None
        if u_before is not None and later is not None:
            to_u = later * (1 - spikes_before) if hard else later
            if not ctx.detach_reset:
                to_spikes = -later * u_before if hard else -later * v_threshold
        return to_current, to_u, to_spikes, to_tau, None, None, None, None, None


def _leak(tau: float | Tensor, t: int) -> float | Tensor:
    return tau[t] if isinstance(tau, Tensor) else tau


def _exact(tau: float, dtype: torch.dtype) -> bool:
    """Whether addcmul rounds as single steps do: it sums up in float32, where they round tau U to u's own type."""
    return dtype.itemsize >= 4 or frexp(tau)[0] == 0.5


def _silent(u: Tensor, v_threshold: float) -> Tensor:
    """1 - O of potentials, in their own type: booleans as masks cost a CPU twenty times as much."""
    u = u.detach()
    return torch.lt(u, v_threshold, out=torch.empty_like(u))


def _left(u: Tensor, spikes: Tensor, v_threshold: float, hard: bool) -> Tensor:
    """The membrane potential after the reset."""
    return u * (1 - spikes) if hard else u - v_threshold * spikes
