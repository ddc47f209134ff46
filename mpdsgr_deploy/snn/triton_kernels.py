"""The kernels of `triton_lif`: T steps of LIF neurons forward and backward, and the last part of tdBN's gradient.

A tensor [S, B, C, ...] is read as S steps of N elements, in any memory order of a step: the element of channel c and
member m of M = N / C is at offset (m // D C + c) D + m % D, where D is the stride of the channels (H W in contiguous
memory, 1 in channels-last). If nothing is computed per channel, C = 1 and D = N. A program runs all T steps of BLOCK_M
members of BLOCK_C channels in registers. Each of the P programs writes its own sums over members, so that they are
added in the same order every time. Arithmetic is float32, and every result of the membrane's equation is rounded to
DTYPE. The kernels are launched without fusing multiplication and addition, so that a potential is the same number
wherever it is computed. An argument that is None switches off the part of the kernel that uses it.
"""

import triton
import triton.language as tl

# kinds that `_derivative` implements
KINDS = frozenset({"triangle", "rectangular", "sigmoid", "superspike", "exponential", "arctan"})
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def _step(current, u, spikes, tau, v_threshold, HARD: tl.constexpr, DTYPE: tl.constexpr):
    """Return the potential of the step after that of `u` and `spikes`."""
    after_reset = u * (1.0 - spikes) if HARD else _rounded(u - _rounded(v_threshold * spikes, DTYPE), DTYPE)
    return _rounded(_rounded(tau * after_reset, DTYPE) + current, DTYPE)


@triton.jit
def _derivative(v, parameter, KIND: tl.constexpr):
    """Return the derivative of a kind in KINDS, with the formula of `mpdsgr_deploy.surrogates`."""
    if KIND == "triangle":
        return tl.maximum(parameter - tl.abs(v), 0.0) / (parameter * parameter)
    elif KIND == "rectangular":
        return tl.where(tl.abs(v) < parameter / 2, 1.0 / parameter, 0.0)
    elif KIND == "sigmoid":
        return parameter * tl.sigmoid(parameter * v) * (1 - tl.sigmoid(parameter * v))
    elif KIND == "superspike":
        return 1 / ((1 + parameter * tl.abs(v)) * (1 + parameter * tl.abs(v)))
    elif KIND == "exponential":
        return tl.exp(-tl.abs(v) / parameter) / (2 * parameter)
    elif KIND == "arctan":
        return parameter / 2 / (1 + (HALF_PI * parameter * v) * (HALF_PI * parameter * v))


@triton.jit
def _current(x, at, inside, mean, factor, bias, NORM: tl.constexpr):
    current = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if NORM:
        current = (current - mean) * factor + bias
    return current


@triton.jit
def lif_forward(
    x,  # [S, N]
    mean,  # [C], as factor and bias: the current is (x - mean) factor + bias; None: it is x
    factor,
    bias,
    spikes,  # [T, N]
    u_saved,  # [T, N] or None: U_t
    sums,  # [P, T, C] or None, as the two below: a program's sum of U_t,
    squares,  # of the squared distance of U_t to the program's own mean,
    removed,  # and of what the reset after step t takes away
    tau,
    v_threshold,
    N,
    C,
    D,
    M,
    T: tl.constexpr,
    HELD: tl.constexpr,  # S = 1: one current for all steps
    HARD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute spikes and, if requested, potentials and sums for their moments."""
    program = tl.program_id(0)
    member = program * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = column[None, :]
    inside = (member < M) & (channel < C)
    at = (member // D * C + channel) * D + member % D
    NORM: tl.constexpr = mean is not None
    if NORM:
        mean = tl.load(mean + channel, mask=channel < C, other=0)
        factor = tl.load(factor + channel, mask=channel < C, other=0)
        bias = tl.load(bias + channel, mask=channel < C, other=0)
    u = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    fired = u
    if HELD:
        current = _current(x, at, inside, mean, factor, bias, NORM)
    for t in range(T):
        if not HELD:
            current = _current(x, at, inside, mean, factor, bias, NORM)
            x += N
        u = _step(current, u, fired, tau, v_threshold, HARD, DTYPE)
        fired = (u >= v_threshold).to(tl.float32)
        tl.store(spikes + at, fired.to(spikes.dtype.element_ty), mask=inside)
        spikes += N
        if u_saved is not None:
            tl.store(u_saved + at, u.to(u_saved.dtype.element_ty), mask=inside)
            u_saved += N
        if sums is not None:
            count = tl.minimum(M - program * BLOCK_M, BLOCK_M).to(tl.float32)
            total = tl.sum(tl.where(inside, u, 0.0), 0)
            distance = tl.where(inside, u - (total / count)[None, :], 0.0)
            reset = u * fired if HARD else v_threshold * fired
            place = (program * T + t) * C + column
            tl.store(sums + place, total, mask=column < C)
            tl.store(squares + place, tl.sum(distance * distance, 0), mask=column < C)
            tl.store(removed + place, tl.sum(tl.where(inside, reset, 0.0), 0), mask=column < C)


@triton.jit
def lif_backward(
    x,  # as in lif_forward; None where nothing needs it
    mean,
    factor,
    deviation,  # [C]: 1 / sqrt(variance + eps)
    u_saved,
    grad_u,  # [T, N] or None, as grad_spikes: gradients of the loss in potentials and spikes
    grad_spikes,
    slope,  # [T, C] or None, as constant: slope U_t + constant is the gradient in U_t through the moments
    constant,
    to_x,  # [S, N]: the gradient in the current; in x itself if FROZEN
    sums,  # [P, C] or None, as products: a program's sum of the gradient in the current, and of it times x normalised
    products,
    tau,
    v_threshold,
    parameter,  # width of the surrogate
    N,
    C,
    D,
    M,
    T: tl.constexpr,
    HELD: tl.constexpr,
    HARD: tl.constexpr,
    DETACH: tl.constexpr,  # no gradient passes through the spikes that reset
    FROZEN: tl.constexpr,  # mean and deviation are constants
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient in the current, or in tdBN's input if that is FROZEN, and the sums for tdBN's gradient."""
    program = tl.program_id(0)
    member = program * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = column[None, :]
    inside = (member < M) & (channel < C)
    at = (member // D * C + channel) * D + member % D
    if mean is not None:
        mean = tl.load(mean + channel, mask=channel < C, other=0)
        factor = tl.load(factor + channel, mask=channel < C, other=0)
        deviation = tl.load(deviation + channel, mask=channel < C, other=0)
    later = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)  # tau d of the next step, see `multistep`
    total, product, held = later, later, later
    for i in range(T):
        t = T - 1 - i
        # added to the pointer before the tile, so that it is one addition and not one per element
        begin = tl.cast(N, tl.int64) * t
        u = tl.load(u_saved + begin + at, mask=inside, other=0).to(tl.float32)
        v = u - v_threshold
        d = tl.zeros_like(u)
        if grad_spikes is not None:
            d += tl.load(grad_spikes + begin + at, mask=inside, other=0).to(tl.float32)
        if not DETACH:
            d -= later * (u if HARD else v_threshold)
        d *= _derivative(v, parameter, KIND)
        d += later * (1.0 - (v >= 0).to(tl.float32)) if HARD else later
        if grad_u is not None:
            d += tl.load(grad_u + begin + at, mask=inside, other=0).to(tl.float32)
        if slope is not None:
            row = t * C + channel
            d += tl.load(slope + row, mask=channel < C, other=0) * u
            d += tl.load(constant + row, mask=channel < C, other=0)
        if sums is not None:
            read = tl.load((x if HELD else x + begin) + at, mask=inside, other=0).to(tl.float32)
            total += d
            product += d * ((read - mean) * deviation)
        if HELD:
            held += d
        else:
            out = d * factor if FROZEN else d
            tl.store(to_x + begin + at, out.to(to_x.dtype.element_ty), mask=inside)
        later = tau * d
    if HELD:
        out = held * factor if FROZEN else held
        tl.store(to_x + at, out.to(to_x.dtype.element_ty), mask=inside)
    if sums is not None:
        place = program * C + column
        tl.store(sums + place, tl.sum(tl.where(inside, total, 0.0), 0), mask=column < C)
        tl.store(products + place, tl.sum(tl.where(inside, product, 0.0), 0), mask=column < C)


@triton.jit
def norm_backward(
    d,  # [S, N]: the gradient in the current, overwritten by that in x
    x,
    mean,  # [C], as those that follow
    deviation,
    factor,
    mean_d,  # means over all members of all S steps: of d,
    mean_product,  # and of d times x normalised
    N,
    C,
    D,
    M,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute factor (d - E[d] - x^ E[d x^]), where x^ = (x - mean) deviation."""
    member = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (member < M) & (channel < C)
    at = tl.program_id(2).to(tl.int64) * N + (member // D * C + channel) * D + member % D
    valid = channel < C
    normalised = tl.load(x + at, mask=inside, other=0).to(tl.float32) - tl.load(mean + channel, mask=valid, other=0)
    normalised *= tl.load(deviation + channel, mask=valid, other=0)
    out = tl.load(d + at, mask=inside, other=0).to(tl.float32) - tl.load(mean_d + channel, mask=valid, other=0)
    out -= normalised * tl.load(mean_product + channel, mask=valid, other=0)
    out *= tl.load(factor + channel, mask=valid, other=0)
    tl.store(d + at, out.to(d.dtype.element_ty), mask=inside)
