"""LIF neurons on a GPU: one kernel forward and one backward for all T steps, with tdBN and the moments of U.

    tdBN      I = (x - mean) lambda alpha V_th / sqrt(var + eps) + beta
    membrane  U_t = tau U_{t-1} (1 - O_{t-1}) + I_t   or   tau (U_{t-1} - V_th O_{t-1}) + I_t,   O_t = [U_t >= V_th]
    moments   E[U_t], Var[U_t] and the mean change by the reset, E[U_t O_t] or V_th E[O_t], per step and channel

`triton_lif` gives the same bits as `multistep_lif`: it computes in the precision of the current and writes potentials.
`norm_lif` is for whole layers: it never writes the normalised current, and potentials only for an observer or a
backward pass. The backward kernel computes the gradient d in I and, per channel, sum d and sum d x^ with
x^ = (x - mean) / sqrt(var + eps). A second, elementwise kernel computes tdBN's gradient from them,

    dx = lambda alpha V_th / sqrt(var + eps) (d - E[d] - x^ E[d x^]).

For fixed statistics, it is the first factor times d and needs no second kernel. Second derivatives are not supported,
nor are leaks that are tensors, which `multistep_lif` handles.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpdsgr_deploy.snn import triton_kernels as kernels
from mpdsgr_deploy.snn.lif_state import LIFConstants, StepMoments
from mpdsgr_deploy.snn.memory_order import is_dense, strided_as
from mpdsgr_deploy.snn.surrogate import Surrogate
from mpdsgr_deploy.snn.tdbn import TdBN

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Multiplication and addition round separately, as in torch; this costs no time, because memory is the bottleneck.
OPTIONS = {"enable_fp_fusion": False}


def takes(x: Tensor, tau: float | Tensor, surrogate: Surrogate) -> bool:
    """Whether the kernels support the type of x, the leak (one for all steps) and the kind of surrogate."""
    supported = surrogate.name in kernels.KINDS and surrogate.parameter is not None
    return supported and x.dtype in _TYPES and not isinstance(tau, Tensor)


class NormLIF(NamedTuple):
    """Spikes [T, B, C, ...] in the type of x and, for observed neurons, potentials (float32) and their moments."""

    spikes: Tensor
    u: Tensor | None
    moments: StepMoments | None


def triton_lif(current: Tensor, constants: LIFConstants) -> tuple[Tensor, Tensor]:
    """Return potentials and spikes [T, B, ...] for a current [T, B, ...], or [1, B, ...] for one that does not change.

    The neurons are at rest before the first step.
    """
    task = _Task(constants, rounded=True, potentials=True, moments=False, frozen=False)
    spikes, u, *_ = _Lif.apply(current, None, None, None, None, task)
    return u, spikes


def norm_lif(x: Tensor, norm: TdBN | None, constants: LIFConstants, *, observed: bool = False) -> NormLIF:
    """Run neurons, at rest before the first step, on the output of tdBN, in float32 for any type of x.

    x: [T, B, C, ...], or [1, B, C, ...] for an input that does not change. norm: None if x is the current itself. In
        train mode it normalises by the statistics of x and updates its running statistics.
    observed: whether to return the potentials and their moments.
    """
    scale = bias = mean = deviation = None
    x = x if is_dense(x) else x.contiguous()
    if norm is not None:
        scale, bias = norm.scale.float(), norm.bias.float()
        with torch.no_grad():
            mean, variance = norm.running_mean, norm.running_var
            if norm.training:
                mean, variance = torch.batch_norm_update_stats(x.flatten(0, 1), mean, variance, norm.momentum)
            deviation = (variance + norm.eps).rsqrt()
            mean = mean.clone()  # the running mean may change before the backward pass
    frozen = norm is not None and not norm.training
    task = _Task(constants, rounded=False, potentials=observed, moments=observed, frozen=frozen)
    spikes, u, *moments = _Lif.apply(x, scale, bias, mean, deviation, task)
    return NormLIF(spikes, u, StepMoments(*moments) if observed else None)


class _Task(NamedTuple):
    constants: LIFConstants
    rounded: bool  # whether every step is rounded to the type of x, as torch does
    potentials: bool  # whether the membrane potentials are an output
    moments: bool
    frozen: bool  # whether the statistics of tdBN are constants


class _Tiles(NamedTuple):
    """How the N elements of a step are divided among programs; `triton_kernels` explains N, C, D and M."""

    N: int
    C: int
    D: int
    M: int
    block_m: int
    block_c: int

    @property
    def constants(self) -> dict[str, int]:
        """The constants of a launch, with four elements per thread, which are one load of 16 bytes.

        Compiled for sm_90, a thread then needs 32 registers, 48 in channels-last, so that most of a multiprocessor's 64
        warps fit.
        """
        return {"BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "num_warps": self.block_m * self.block_c // 128}

    def grid(self, *more: int) -> tuple[int, ...]:
        return (triton.cdiv(self.M, self.block_m), triton.cdiv(self.C, self.block_c), *more)


def _tiles(x: Tensor, per_channel: bool) -> _Tiles:
    """Return how a dense x [S, B, C, ...] is divided among the programs of a kernel."""
    N = x[0].numel()
    assert N < 2**31  # offsets within a step have 32 bits
    C = x.shape[2] if per_channel else 1
    D = x.stride(2) if C > 1 else N
    # A program reads several channels only if these are adjacent in memory, and then 16, which are one or two sectors
    # of memory. With more channels it would read fewer members, and leave more sums for torch to add.
    block_c = 1 if D >= 16 else min(triton.next_power_of_2(C), 16)
    return _Tiles(N, C, D, N // C, 512 if block_c == 1 else 1024 // block_c, block_c)


def _launch(kernel: Any, x: Tensor, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(x):  # does nothing on a CPU, where the interpreter runs
        kernel[grid](*arguments, **constants, **OPTIONS)


class _Lif(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        deviation: Tensor | None,
        task: _Task,
    ) -> tuple[Tensor | None, ...]:
        constants = task.constants
        T = constants.steps
        x = x if is_dense(x) else x.contiguous()
        cut = _tiles(x, scale is not None or task.moments)
        shape, stride = (T, *x.shape[1:]), (cut.N, *x.stride()[1:])
        spikes = x.new_empty_strided(shape, stride)
        dtype = x.dtype if task.rounded else torch.float32
        stored = task.potentials or any(ctx.needs_input_grad)
        u_saved = torch.empty_like(spikes, dtype=dtype) if stored else None
        factor = None if scale is None or deviation is None else scale * deviation
        grid = cut.grid()
        partial = x.new_empty((3, grid[0], T, cut.C), dtype=torch.float32) if task.moments else None
        shared = {"T": T, "HELD": len(x) < T, "HARD": constants.hard, **cut.constants}
        inputs = (x, mean, factor, bias)
        outputs = (spikes, u_saved, *_each(partial, 3))
        numbers = (float(constants.tau), float(constants.v_threshold), *cut[:4])
        _launch(kernels.lif_forward, x, grid, *inputs, *outputs, *numbers, DTYPE=_TYPES[dtype], **shared)
        moments = (None, None, None) if partial is None else _merged(partial, cut)
        statistics = scale is not None and not task.frozen
        # the sums of tdBN's backward pass: for the gradient in x under its own statistics, or in lambda and beta
        ctx.sums = statistics or any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if ctx.sums else None, mean, factor, deviation, u_saved, moments[0])
        ctx.task, ctx.cut, ctx.shared, ctx.statistics = task, cut, shared, statistics
        ctx.x = x.to("meta")  # keeps its type, shape and memory layout without its data
        ctx.set_materialize_grads(False)
        if moments[2] is not None:
            ctx.mark_non_differentiable(moments[2])
        return spikes, u_saved if task.potentials else None, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 6
        x, mean, factor, deviation, u_saved, mean_u = ctx.saved_tensors
        cut, constants = ctx.cut, ctx.task.constants
        device = next(grad for grad in grads if grad is not None).device
        to_x = torch.empty_like(ctx.x, device=device)
        stride = (cut.N, *to_x.stride()[1:])
        received = [None if grad is None else strided_as(grad, stride) for grad in (grads[1], grads[0])]
        slope = constant = None
        if grads[2] is not None or grads[3] is not None:
            slope = torch.zeros_like(mean_u) if grads[3] is None else grads[3] * (2 / cut.M)
            constant = -slope * mean_u if grads[2] is None else grads[2] / cut.M - slope * mean_u
        grid = cut.grid()
        sums = to_x.new_empty((2, grid[0], cut.C), dtype=torch.float32) if ctx.sums else None
        _launch(
            kernels.lif_backward,
            to_x,
            grid,
            *(x, mean, factor, deviation, u_saved, *received, slope, constant),
            *(to_x, *_each(sums, 2)),
            *(float(constants.tau), float(constants.v_threshold), float(constants.surrogate.parameter), *cut[:4]),
            **ctx.shared,
            DETACH=constants.detach_reset,
            FROZEN=ctx.task.frozen,
            KIND=constants.surrogate.name,
        )
        to_scale = to_bias = None
        if sums is not None:
            to_bias, to_scale = sums.sum(1)
        if ctx.statistics:
            means = (total / (len(to_x) * cut.M) for total in (to_bias, to_scale))
            norms = (to_x, x, mean, deviation, factor, *means, *cut[:4])
            _launch(kernels.norm_backward, to_x, cut.grid(len(to_x)), *norms, **cut.constants)
        return to_x, to_scale, to_bias, None, None, None


def _each(parts: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    return (None,) * count if parts is None else parts.unbind()


def _merged(partial: Tensor, cut: _Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and mean change by the reset, each [T, C], from the sums of all programs, [3, P, T, C]."""
    sums, squares, removed = partial
    counts = sums.new_full((len(sums), 1, 1), cut.block_m)
    counts[-1] = cut.M - (len(sums) - 1) * cut.block_m
    mean = sums.sum(0) / cut.M
    between = counts * (sums / counts - mean).square()
    return mean, (squares + between).sum(0) / cut.M, removed.sum(0) / cut.M
