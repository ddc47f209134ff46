"""The GPU's kernels against plain torch, on the CPU with TRITON_INTERPRET=1, else on a GPU: see `test_triton_lif`."""

import itertools
import os
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from mpdsgr_deploy.mpd import empirical, expected_gradient, layer_value, mean_of_layers, theorem
from mpdsgr_deploy.snn import LIF, SpikingLayer, TdBN, Trace, lif, multistep, triton_lif
from mpdsgr_deploy.snn.lif_state import LIFConstants
from mpdsgr_deploy.snn.surrogate import make_surrogate
from mpdsgr_deploy.snn.tdbn import frozen_statistics
from mpdsgr_deploy.snn.triton_lif import norm_lif
from mpdsgr_deploy.surrogates import KINDS

T, B, C, H, W = 3, 3, 3, 13, 15  # 585 members of a channel and 1,755 elements: no multiples of the tiles' 512
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = {"contiguous": (B, C, H, W), "channels-last": (B, C, H, W), "flat": (B, C)}
CASES = [  # every pair of an order, a mode and a current that is held or not
    (order, (i + j) % 2 == 1, mode, i % 2 == 0)
    for (i, order), (j, mode) in itertools.product(enumerate(SHAPES), enumerate(("train", "eval", "none")))
]

LIF_CASES = [  # every path of the kernels with one surrogate, and every other surrogate
    *itertools.product(["triangle"], ("hard", "soft"), (False, True)),
    *((name, "hard", False) for name in KINDS if name != "triangle"),
]


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does to bfloat16 (cvt.rn); Triton's interpreter cuts the bits off."""
    cut = interpreter._convert_float

    def convert(x: np.ndarray, source: tl.dtype, to: tl.dtype, mode: Any) -> np.ndarray:
        if (source, to) != (tl.float32, tl.bfloat16):
            return cut(x, source, to, mode)
        return torch.tensor(x.view(np.float32)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def drawn(*shape: int, seed: int, order: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if order == "channels-last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    return x.to(DEVICE)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    """Within rtol of the largest: sums of opposite numbers are allowed no more digits than their summands."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= rtol * expected.abs().max()


def single_steps(current: Tensor, how: LIFConstants, reset: Any) -> tuple[Tensor, Tensor]:
    steps = current.unbind(0) * (how.steps if len(current) == 1 else 1)
    states = lif(steps, tau=how.tau, v_threshold=how.v_threshold, reset=reset, surrogate=how.surrogate)
    return torch.stack([s.u for s in states]), torch.stack([s.spikes for s in states])


@pytest.mark.parametrize(("name", "reset", "held"), LIF_CASES)
def test_lif_is_that_of_single_steps_to_the_bit(name: str, reset: str, held: bool) -> None:
    how = LIFConstants(T, 0.6, 0.75, reset == "hard", make_surrogate(name))
    outputs, gradients = [], []
    for kernels in (False, True):
        current = drawn(1 if held else T, B, C, H, W, seed=0, order="channels-last").add_(0.5).requires_grad_()
        run = triton_lif.triton_lif if kernels else partial(single_steps, reset=reset)
        found = run(current, how)
        sum((drawn(*y.shape, seed=3 + i) * y).sum() for i, y in enumerate(found)).backward()
        outputs.append(found)
        gradients.append(current.grad)
    for single, fused in zip(*outputs, strict=True):
        assert torch.equal(single, fused)
    close(gradients[1], gradients[0])


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("used", [0, 1])
def test_a_detached_reset_and_a_loss_of_one_output(hard: bool, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multistep, "_on_gpu", lambda _: False)
    how, gradients = LIFConstants(T, 0.5, 1.0, hard, make_surrogate("triangle"), detach_reset=True), []
    for run in (partial(multistep.multistep_lif, state=None), triton_lif.triton_lif):
        current = drawn(T, B, C, seed=0).requires_grad_()
        (run(current, constants=how)[used] * drawn(T, B, C, seed=3)).sum().backward()
        gradients.append(current.grad)
    close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_half_precision_rounds_where_torch_does(dtype: torch.dtype, reset: str) -> None:
    how = LIFConstants(T, 0.6, 0.75, reset == "hard", make_surrogate("triangle"))
    outputs, gradients = [], []
    for kernels in (False, True):
        current = drawn(T, B, C, H, W, seed=0, dtype=dtype).requires_grad_()
        run = triton_lif.triton_lif if kernels else partial(single_steps, reset=reset)
        found = run(current, how)
        (found[1] * drawn(T, B, C, H, W, seed=3, dtype=dtype)).sum().backward()
        outputs.append(found)
        gradients.append(current.grad)
    for single, fused in zip(*outputs, strict=True):
        assert fused.dtype == dtype
        assert torch.equal(single, fused)
    close(gradients[1], gradients[0], rtol=4 * torch.finfo(dtype).eps)


def moments_of(u: Tensor, spikes: Tensor, how: LIFConstants) -> list[Tensor]:
    """Plainly, and with autograd's own gradient."""
    u, spikes = u.transpose(1, 2).flatten(2), spikes.detach().transpose(1, 2).flatten(2)
    removed = u.detach() * spikes if how.hard else how.v_threshold * spikes
    return [u.mean(2), u.var(2, correction=0), removed.mean(2)]


def run_norm(
    kernels: bool, x: Tensor, norm: TdBN | None, how: LIFConstants
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Spikes, moments, and what a loss of all of them sends to x and the parameters; plainly in float64."""
    x = x.clone().requires_grad_()
    if kernels:
        spikes, _, found = norm_lif(x, norm, how, observed=True)
        moments = list(found)
    else:
        norm = norm and norm.double()
        current = x.double() if norm is None else norm(x.double().flatten(0, 1)).unflatten(0, x.shape[:2])
        u, spikes = single_steps(current, how, "hard" if how.hard else "soft")
        moments = moments_of(u, spikes, how)
    loss = (drawn(*spikes.shape, seed=4) * spikes).sum() / 50
    loss = loss + sum((drawn(*m.shape, seed=5 + i) * m).sum() for i, m in enumerate(moments[:2])) * 10
    loss.backward()
    gradients = {"x": x.grad}
    if norm is not None:
        gradients |= {"weight": norm.weight.grad.float(), "bias": norm.bias.grad.float()}
    return spikes.to(x.dtype), [m.float() for m in moments], gradients


def trained(training: bool, channels: int = C) -> TdBN:
    """With parameters and statistics other than those it starts with."""
    norm = TdBN(channels, v_threshold=0.75, alpha=0.8).to(DEVICE)
    with torch.no_grad():
        norm.weight += drawn(channels, seed=7) / 4
        norm.bias += drawn(channels, seed=8) / 4
        norm.running_mean += drawn(channels, seed=9) / 4
        norm.running_var += drawn(channels, seed=10).abs()
    return norm.train(training)


@pytest.mark.parametrize(("order", "held", "mode", "hard"), CASES)
def test_tdbn_and_moments(order: str, held: bool, mode: str, hard: bool) -> None:
    how = LIFConstants(T, 0.5, 0.75, hard, make_surrogate("triangle"))
    x = drawn(1 if held else T, *SHAPES[order], seed=0, order=order) * 1.5 + 0.3
    norms = [None if mode == "none" else trained(mode == "train") for _ in range(2)]
    plain, fused = (run_norm(kernels, x, norms[kernels], how) for kernels in (False, True))
    assert torch.equal(plain[0], fused[0])  # no potential of these lies within rounding of the threshold
    for expected, found in zip(plain[1], fused[1], strict=True):
        close(found, expected, rtol=2e-6)
    for name, expected in plain[2].items():
        # in train mode the statistics, by torch and in float32, are a part of the error; and a held current is the
        # first potential, whose moments tdBN fixes: nearly all of their gradient cancels
        close(fused[2][name], expected, rtol=(5e-6 if held else 2e-6) if mode == "train" else 1e-6)
    if mode == "train":
        close(norms[1].running_mean, norms[0].running_mean.float())
        close(norms[1].running_var, norms[0].running_var.float())


def test_bfloat16_input_of_tdbn_has_a_float32_membrane() -> None:
    how = LIFConstants(T, 0.5, 0.75, True, make_surrogate("sigmoid"))
    x = drawn(T, B, C, H, W, seed=0, order="channels-last", dtype=torch.bfloat16)
    plain, fused = (run_norm(kernels, x, trained(True), how) for kernels in (False, True))
    assert fused[0].dtype == torch.bfloat16
    assert torch.equal(plain[0], fused[0])
    for expected, found in zip(plain[1], fused[1], strict=True):
        close(found, expected, rtol=2e-6)
    for name, expected in plain[2].items():
        close(fused[2][name], expected, rtol=2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(("shape", "order"), [((B, 20, 3, 2), "contiguous"), ((B, 20, 5, 4), "channels-last")])
def test_more_channels_than_a_program_takes(shape: tuple[int, ...], order: str) -> None:
    how = LIFConstants(T, 0.5, 0.75, True, make_surrogate("triangle"))
    x = drawn(T, *shape, seed=0, order=order)
    plain, fused = (run_norm(kernels, x, trained(True, 20), how) for kernels in (False, True))
    assert torch.equal(plain[0], fused[0])
    for expected, found in zip([*plain[1], *plain[2].values()], [*fused[1], *fused[2].values()], strict=True):
        close(found, expected, rtol=2e-6)


def test_memory_with_gaps_and_gradients_in_another_order() -> None:
    how = LIFConstants(T, 0.5, 0.75, True, make_surrogate("triangle"))
    x = drawn(T, B, C, H, 2 * W, seed=0)[..., ::2]
    plain, fused = (run_norm(kernels, x, trained(True), how) for kernels in (False, True))
    assert torch.equal(plain[0], fused[0])
    close(fused[2]["x"], plain[2]["x"], rtol=2e-6)
    current, again = (x.clone().requires_grad_() for _ in range(2))
    triton_lif.triton_lif(current, how)[1].sum().backward()  # a gradient of one number, expanded
    single_steps(again, how, "hard")[1].sum().backward()
    close(current.grad, again.grad)


def test_parameters_that_need_no_gradient_and_statistics_that_stay() -> None:
    how = LIFConstants(T, 0.5, 0.75, True, make_surrogate("triangle"))
    x, norm = drawn(T, B, C, H, W, seed=0), trained(False).requires_grad_(False)
    before = norm.running_mean.clone()
    for training in (False, True):
        norm.train(training)
        plain, fused = x.clone().requires_grad_(), x.clone().requires_grad_()
        with frozen_statistics(norm):
            single_steps(norm(plain.flatten(0, 1)).unflatten(0, (T, B)), how, "hard")[1].square().sum().backward()
            norm_lif(fused, norm, how).spikes.square().sum().backward()
        close(fused.grad, plain.grad, rtol=2e-6)
        assert torch.equal(norm.running_mean, before)


def test_a_second_derivative_is_refused() -> None:
    current = drawn(T, B, C, seed=0).requires_grad_()
    _, spikes = triton_lif.triton_lif(current, LIFConstants(T, 0.5, 1.0, True, make_surrogate("sigmoid")))
    loss = (drawn(T, B, C, seed=1).requires_grad_() * spikes).sum()
    (gradient,) = torch.autograd.grad(loss, current, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("estimator", [theorem, empirical])
def test_a_layer_with_its_regulariser(
    observed: bool, held: bool, estimator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SpikingLayer, told that its tensors are on a GPU, gives what it gives on a CPU."""
    results, x = [], drawn(1 if held else T, B, 2, H, W, seed=0, order="channels-last")
    for kernels in (False, True):
        monkeypatch.setattr(multistep, "_on_gpu", lambda _, kernels=kernels: kernels)
        torch.manual_seed(0)  # and a layer made on the CPU: the same everywhere
        neuron = LIF(surrogate=make_surrogate("sigmoid"))
        neuron.hold = T
        layer = SpikingLayer("one", torch.nn.Conv2d(2, C, 3), TdBN(C, v_threshold=1.0), neuron).to(DEVICE)
        traces: list[Trace] = []
        spikes = layer(x, traces.append if observed else None)
        loss = (drawn(*spikes.shape, seed=1) * spikes).sum() / 100
        if observed:
            assert (traces[0].moments is not None) == kernels
            loss = loss + mean_of_layers([layer_value(trace, estimator, expected_gradient) for trace in traces])
            loss = loss + (drawn(B, C, H - 2, W - 2, seed=2) * traces[0].states[1].u).mean()
        loss.backward()
        results.append((spikes, loss, [p.grad for p in layer.parameters()]))
    (plain, expected, to_plain), (fused, found, to_fused) = results
    assert torch.equal(plain, fused)
    close(found, expected)
    for one, other in zip(to_plain, to_fused, strict=True):
        # batch normalisation takes from a convolution's bias all its effect: its gradient is rounding
        assert (one - other).abs().max() <= 2e-6 * max(p.abs().max() for p in to_plain)
