"""All T steps of LIF neurons as one node of autograd's graph, with the same bits as `lif` in both passes.

For single steps, autograd stores the potential before and after the reset, the spikes and the input of the surrogate at
every step. Here only the potentials are stored, from which the rest is computed. With

    hard   U_t = tau_t U_{t-1} (1 - O_{t-1}) + I_t          soft   U_t = tau_t (U_{t-1} - V_th O_{t-1}) + I_t

the gradient d_t of the loss in U_t is, from the last step backwards,

    hard   d_t = gU_t + tau_{t+1} d_{t+1} (1 - O_t) + (gO_t - tau_{t+1} d_{t+1} U_t) s(U_t - V_th)
    soft   d_t = gU_t + tau_{t+1} d_{t+1}           + (gO_t - tau_{t+1} d_{t+1} V_th) s(U_t - V_th)

where gU and gO are the gradients that potentials and spikes get from outside the layer, and s is the surrogate. A
detached reset, whose spikes pass no gradient, leaves out the term after gO_t. For float16 and bfloat16 potentials, the
gradient is computed in float32 and rounded at the end. Second derivatives are not supported.

`_forward` and `_backward` run in two ways. In place, every result is written into its row of the output, which is the
fastest way without a compiler. Compiled, by `compiled.py` or as a part of a network that its user compiles, results are
new tensors that are stacked at the end, and the compiler makes one loop of all steps.
"""

from collections.abc import Callable
from functools import cache, partial
from math import frexp
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpdsgr_deploy.snn import compiled
from mpdsgr_deploy.snn.lif_state import LIFConstants
from mpdsgr_deploy.snn.memory_order import MemoryOrder
from mpdsgr_deploy.snn.surrogate import Surrogate

Leak = float | Tensor


def multistep_lif(
    current: Tensor, state: tuple[Tensor, Tensor] | None, constants: LIFConstants
) -> tuple[Tensor, Tensor]:
    """Return potentials and spikes [T, B, ...] for `constants.steps` = T steps.

    current: [T, B, ...], or [1, B, ...] for a current that is the same at all steps. state: potential and spikes
    [B, ...] before the first step, None at rest. On a GPU, the kernels of `triton_lif` run the cases they support.
    """
    tau = constants.tau.to(current) if isinstance(constants.tau, Tensor) else constants.tau
    if state is not None:  # what the first step leaves of it is added to the current of neurons at rest
        before, spikes = state
        spikes = spikes.detach() if constants.detach_reset else spikes
        left = _leak(tau, 0) * _after_reset(before, spikes, constants.v_threshold, constants.hard)
        steps = current.expand(constants.steps, *current.shape[1:])
        current = torch.cat([(left + steps[0])[None], steps[1:]])
    kernels = gpu_kernels(current, tau, constants.surrogate)
    u, fired = _MultiStep.apply(current, tau, constants) if kernels is None else kernels.triton_lif(current, constants)
    return u, fired


def gpu_kernels(x: Tensor, tau: Leak, surrogate: Surrogate) -> Any:
    """Return the module `triton_lif` if x is on a GPU and the module supports these neurons; otherwise None."""
    kernels = _triton_lif() if _on_gpu(x) else None
    return kernels if kernels is not None and kernels.takes(x, tau, surrogate) else None


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


@cache
def _triton_lif() -> Any:
    """Import `triton_lif`; return None without Triton, which only GPU builds of torch contain."""
    try:
        from mpdsgr_deploy.snn import triton_lif
    except ImportError:
        return None
    return triton_lif


class _MultiStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, tau: Leak, lif: LIFConstants) -> tuple[Tensor, Tensor]:
        constants = lif.steps, tau, lif.v_threshold, lif.hard
        # not compiled in 16 bits, because single steps round after every operation and a compiled loop does not
        u, spikes = _run(_forward, constants, (current,), compiles=current.dtype.itemsize >= 4)
        ctx.save_for_backward(u, tau if isinstance(tau, Tensor) else None)
        ctx.tau, ctx.lif, ctx.held = tau, lif, len(current) < lif.steps
        ctx.set_materialize_grads(False)
        return u, spikes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        u, leaks = ctx.saved_tensors
        tau, lif = ctx.tau if leaks is None else leaks, ctx.lif
        to_tau = torch.zeros_like(leaks) if leaks is not None and ctx.needs_input_grad[1] else None
        function = _backward if to_tau is None else partial(_backward, to_tau=to_tau)
        constants = tau, lif.v_threshold, lif.hard, lif.surrogate.derivative, lif.detach_reset, ctx.held
        return *_run(function, constants, (u, *grads)), to_tau, None


def _run(function: compiled.Function, constants: tuple[Any, ...], tensors: Any, *, compiles: bool = True) -> Any:
    """Return function(*constants, *tensors, in_place=...), compiled if possible and worthwhile."""
    whole, elementwise = torch.compiler.is_compiling(), not any(isinstance(leak, Tensor) for leak in constants)
    if whole or not elementwise:
        return function(*constants, *tensors, in_place=not whole)
    order = MemoryOrder.of(tensors[0])
    results = compiled.run(function, constants, tuple(map(order.flattened, tensors)), compiles=compiles)
    return tuple(map(order.restored, results))


def _forward(
    steps: int, tau: Leak, v_threshold: float, hard: bool, current: Tensor, *, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Return potentials and spikes [T, ...] for a current [T, ...] or [1, ...]."""
    u: Tensor | None = None
    spikes: Tensor | None = None
    held = len(current) < steps
    potentials, fired = _Rows(current, steps, in_place), _Rows(current, steps, in_place)
    for t in range(steps):
        now, row = current[0 if held else t], potentials.row(t)
        if u is None or spikes is None:
            u = torch.mul(now, 1, out=row)
        elif hard and not isinstance(tau, Tensor) and _exact(tau, u.dtype):
            u = torch.addcmul(now, u, _compared(torch.lt, u, v_threshold), value=tau, out=row)
        else:
            u = torch.add(torch.mul(_after_reset(u, spikes, v_threshold, hard), _leak(tau, t), out=row), now, out=row)
        spikes = _compared(torch.ge, u, v_threshold, fired.row(t))
        potentials.put(t, u)
        fired.put(t, spikes)
    return potentials.whole(), fired.whole()


def _backward(
    tau: Leak,
    v_threshold: float,
    hard: bool,
    derivative: Callable[[Tensor], Tensor],
    detach_reset: bool,
    held: bool,
    u: Tensor,
    grad_u: Tensor | None,
    grad_spikes: Tensor | None,
    *,
    in_place: bool,
    to_tau: Tensor | None = None,
) -> tuple[Tensor]:
    """Return the gradient in the current, from those in potentials u and spikes.

    to_tau [T, ...]: is filled with the gradient in the leaks.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    to_current = _Rows(u, 1 if held else len(u), in_place, wide)
    later = total = None  # tau_{t+1} d_{t+1}, and the sum of all d
    for t in reversed(range(len(u))):
        now, row = u[t].to(wide), None if held else to_current.row(t)
        d = torch.zeros_like(now) if grad_spikes is None else grad_spikes[t].to(wide)
        if later is not None and not detach_reset:
            d = torch.sub(d, torch.mul(later, now if hard else v_threshold, out=row), out=row)
        d = torch.mul(d, derivative(now - v_threshold), out=row)
        if later is not None:
            silent = _compared(torch.lt, now, v_threshold) if hard else None
            d = torch.add(d, later, out=row) if silent is None else torch.addcmul(d, later, silent, out=row)
        if grad_u is not None:
            d = torch.add(d, grad_u[t].to(wide), out=row)
        if held:
            total = d if total is None else total + d
        else:
            to_current.put(t, d)
        if to_tau is not None and t:
            fired = (u[t - 1] >= v_threshold).to(u.dtype)
            to_tau[t] = (d * _after_reset(u[t - 1], fired, v_threshold, hard)).sum(0).sum_to_size(to_tau[t].shape)
        later = d * _leak(tau, t) if t else None
    if total is not None:
        to_current.put(0, total)
    return (to_current.whole(),)


class _Rows:
    """The steps [...] of an output [T, ...]: rows that are written in place, or new tensors stacked at the end.

    like: a tensor of the output's type and step shape. wide: the type of the results, if it is not the output's.
    """

    def __init__(self, like: Tensor, steps: int, in_place: bool, wide: torch.dtype | None = None) -> None:
        rows: list[Any] = [None] * steps
        self._dtype, self._whole, self._rows, self._scratch = like.dtype, None, rows, None
        if in_place:
            self._whole = torch.empty_like(like) if len(like) == steps else like.new_empty((steps, *like.shape[1:]))
            self._rows = [*self._whole.unbind(0)]
            if wide not in (None, like.dtype):
                self._scratch = torch.empty_like(like[0], dtype=wide)

    def row(self, t: int) -> Tensor | None:
        """Return the `out` argument of torch's functions for results of step t, of which `put` stores the last one."""
        row: Tensor | None = self._rows[t]
        return row if self._scratch is None else self._scratch

    def put(self, t: int, value: Tensor) -> None:
        if self._whole is None:
            self._rows[t] = value.to(self._dtype)
        elif value is not self._rows[t]:
            self._rows[t].copy_(value)

    def whole(self) -> Tensor:
        return torch.stack(self._rows) if self._whole is None else self._whole


def _leak(tau: Leak, t: int) -> Leak:
    return tau[t] if isinstance(tau, Tensor) else tau


def _exact(tau: float, dtype: torch.dtype) -> bool:
    """Whether addcmul rounds as single steps do, which round tau U to u's type while addcmul sums in float32."""
    return dtype.itemsize >= 4 or frexp(tau)[0] == 0.5


def _compared(compare: Callable[..., Any], u: Tensor, v_threshold: float, out: Tensor | None = None) -> Tensor:
    """Return the comparison as 1 or 0 in u's type; intermediate booleans would take a CPU twenty times as long."""
    compared: Tensor = compare(u, v_threshold, out=torch.empty_like(u) if out is None else out)
    return compared


def _after_reset(u: Tensor, spikes: Tensor, v_threshold: float, hard: bool) -> Tensor:
    return u * (1 - spikes) if hard else u - v_threshold * spikes
