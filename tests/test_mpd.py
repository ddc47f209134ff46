from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import small_recipe
from scipy.stats import norm as normal

from mpdsgr_deploy.diagnostics.distribution import layer_statistics
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.mpd import (
    MEASURES,
    Estimator,
    Measure,
    Moments,
    empirical,
    layer_value,
    leak_sum,
    mean_of_layers,
    overlap,
    reset_shift,
    theorem,
)
from mpdsgr_deploy.snn import LIF, LIFState, TdBN, Trace
from mpdsgr_deploy.snn.surrogate import make_surrogate


def layer_mean(traces: Sequence[Trace], estimator: Estimator, measure: Measure) -> torch.Tensor:
    return mean_of_layers([layer_value(trace, estimator, measure) for trace in traces])


def simulate(
    *, tau: float, reset: str, T: int = 8, samples: int = 400_000, lam: float = 1.0, beta: float = 0.0
) -> Trace:
    """A LIF layer of one channel under the current tdBN promises: N(beta, lam^2), independent over time."""
    draw = torch.Generator().manual_seed(0)
    current = beta + lam * torch.randn(T, samples, 1, generator=draw)
    neuron = LIF(tau=tau, reset=reset, surrogate=make_surrogate("triangle"))
    norm = TdBN(1, v_threshold=1.0)
    torch.nn.init.constant_(norm.weight, lam)
    torch.nn.init.constant_(norm.bias, beta)
    with torch.no_grad():
        _, states = neuron(current)
    return Trace("layer", norm, neuron, states, current)


def test_leak_sum_is_the_geometric_series() -> None:
    assert leak_sum(0.5, 4).tolist() == pytest.approx([1, 1.5, 1.75, 1.875])
    assert leak_sum(1.0, 3).tolist() == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize(("lam", "beta"), [(1.0, 0.0), (0.7, 0.3), (1.2, -0.5)])
def test_theorem_against_monte_carlo(reset: str, lam: float, beta: float) -> None:
    """tau 0.5: mean within 2 % of the spread or of itself, standard deviation within 10 % at every step.

    The mean is exact by construction of S; the deviation is not, since a reset removes variance that Theorem 1 keeps.
    """
    trace = simulate(tau=0.5, reset=reset, lam=lam, beta=beta)
    predicted, measured = theorem(trace), empirical(trace)
    scale = torch.maximum(measured.mu.abs(), measured.sigma)
    assert ((predicted.mu - measured.mu).abs() / scale).max() < 0.02
    assert ((predicted.sigma - measured.sigma).abs() / measured.sigma).max() < 0.10


def test_reset_shift_by_hand() -> None:
    trace = simulate(tau=0.5, reset="hard", T=3, samples=1000)
    removed = [(s.u * s.spikes).mean().item() for s in trace.states]
    expected = [0.0, 0.5 * removed[0], 0.5 * (0.5 * removed[0] + removed[1])]
    assert reset_shift(trace).flatten().tolist() == pytest.approx(expected, rel=1e-5)
    soft = simulate(tau=0.5, reset="soft", T=2, samples=1000)
    assert reset_shift(soft)[1].item() == pytest.approx(0.5 * soft.states[0].spikes.mean().item())


def test_share_in_the_window_at_initialisation() -> None:
    """lambda 1, beta 0, first step: Phi(0) - Phi(-2) = 0.477, and that is what one counts."""
    trace = simulate(tau=0.5, reset="hard", T=1)
    expected = normal.cdf(0) - normal.cdf(-2)
    assert overlap(theorem(trace), make_surrogate("triangle")).item() == pytest.approx(expected, abs=1e-4)
    assert layer_statistics(trace).in_window == pytest.approx(expected, abs=2e-3)


def test_overlap_and_its_gradient_against_scipy() -> None:
    draw = np.random.default_rng(0)
    mu, sigma = draw.normal(0, 1, (4, 6)), draw.uniform(0.2, 2, (4, 6))
    for half_width in (0.5, 1.0, 1.9):
        moments = Moments(torch.tensor(mu, requires_grad=True), torch.tensor(sigma, requires_grad=True))
        found = overlap(moments, make_surrogate("triangle", half_width))
        high, low = (mu + half_width) / sigma, (mu - half_width) / sigma
        assert found.detach().numpy() == pytest.approx(normal.cdf(high) - normal.cdf(low), abs=1e-12)
        found.sum().backward()
        d_mu = (normal.pdf(high) - normal.pdf(low)) / sigma
        d_sigma = -(high * normal.pdf(high) - low * normal.pdf(low)) / sigma
        assert moments.mu.grad.numpy() == pytest.approx(d_mu, abs=1e-12)
        assert moments.sigma.grad.numpy() == pytest.approx(d_sigma, abs=1e-12)


def layer_with_gradients() -> tuple[Trace, TdBN, torch.Tensor]:
    torch.manual_seed(0)
    norm, neuron = TdBN(3, v_threshold=1.0), LIF(tau=0.5, surrogate=make_surrogate("triangle"))
    weights = torch.randn(4, 16, 3, 5, 5, requires_grad=True)
    current = norm(weights.flatten(0, 1)).unflatten(0, (4, 16))
    _, states = neuron(current)
    return Trace("layer", norm, neuron, states, current), norm, weights


def test_theorem_reaches_lambda_and_beta_only() -> None:
    trace, norm, weights = layer_with_gradients()
    overlap(theorem(trace), make_surrogate("triangle")).mean().backward()
    assert norm.weight.grad.abs().min() > 0
    assert norm.bias.grad.abs().min() > 0
    assert weights.grad is None


def test_empirical_reaches_the_weights() -> None:
    trace, _, weights = layer_with_gradients()
    overlap(empirical(trace), make_surrogate("triangle")).mean().backward()
    assert weights.grad.abs().sum() > 0


def test_empirical_moments_and_gradient_against_autograd() -> None:
    u = [torch.randn(8, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    neuron = LIF(v_threshold=1.0, surrogate=make_surrogate("triangle"))
    found = empirical(Trace("layer", None, neuron, [LIFState(x, x) for x in u], torch.stack(u)))
    coefficients = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1))
    (coefficients[0] * found.mu + coefficients[1] * found.sigma).sum().backward()
    for t, x in enumerate(u):
        reference = x.detach().clone().requires_grad_()
        variance, mean = torch.var_mean(reference, (0, 2, 3), correction=0)
        torch.testing.assert_close(found.mu[t].double(), mean - 1, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.sigma[t].double(), variance.sqrt(), rtol=1e-5, atol=1e-6)
        (coefficients[0, t] * mean + coefficients[1, t] * variance.sqrt()).sum().backward()
        torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-6)


def test_a_silent_constant_channel_has_finite_gradients() -> None:
    u = torch.zeros(4, 2, 3, 3, requires_grad=True)
    neuron = LIF(surrogate=make_surrogate("triangle"))
    omega = overlap(
        empirical(Trace("layer", None, neuron, [LIFState(u, u)], u[None])), make_surrogate("triangle", 0.5)
    ).mean()
    omega.backward()
    assert omega.item() == 0
    assert torch.isfinite(u.grad).all()


def test_overlap_is_computed_in_float32_under_autocast() -> None:
    trace = simulate(tau=0.5, reset="hard", T=2, samples=64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_mean([trace], empirical, overlap).dtype == torch.float32


@pytest.mark.parametrize("name", ["triangle", "rectangular", "sigmoid", "superspike"])
@pytest.mark.parametrize("measure", list(MEASURES))
def test_every_measure_is_computed_in_float32_under_autocast(measure: str, name: str) -> None:
    """The mean gradient of some surrogates is a matrix product, which autocast would round to eight bits."""
    trace = simulate(tau=0.5, reset="hard", T=3, samples=1000)
    trace = trace._replace(neuron=LIF(tau=0.5, surrogate=make_surrogate(name)))
    exact = layer_mean([trace], empirical, MEASURES[measure])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer_mean([trace], empirical, MEASURES[measure]), exact)


def test_theorem_without_tdbn_says_what_to_do() -> None:
    trace = simulate(tau=0.5, reset="hard", T=2, samples=64)._replace(norm=None)
    with pytest.raises(InputError, match=r"defence.mpd-sgr.estimator = 'empirical'"):
        layer_mean([trace], theorem, overlap)


@pytest.mark.parametrize(
    ("norm", "readout", "T", "measure"),
    [
        ("bn", "mean", 4, "overlap"),
        ("none", "mean", 4, "expected-gradient"),
        ("tdbn", "membrane", 4, "expected-gradient"),
        ("none", "membrane", 32, "overlap"),
    ],
)
def test_empirical_needs_neither_tdbn_nor_a_mean_readout_nor_few_steps(
    norm: str, readout: str, T: int, measure: str
) -> None:
    """The term is what numpy and scipy make of the same potentials; descending it lowers it."""
    torch.manual_seed(0)
    recipe = small_recipe(model={"width": 0.25, "norm": norm, "readout": readout}, encoding={"T": T})
    model = build_model(recipe, (1, 8, 8), 10)
    if norm == "none":  # at their initial scale its neurons never fire, and a silent layer's heirs never vary
        for layer in model.layers():
            layer.synapse.weight.data *= 4
    x = torch.rand(16, 1, 8, 8)

    def term() -> tuple[torch.Tensor, list[Trace]]:
        traces: list[Trace] = []
        model(x, traces.append)
        return layer_mean(traces, empirical, MEASURES[measure]), traces

    before, traces = term()
    layers = []
    for trace in traces:
        u = torch.stack([state.u for state in trace.states]).detach().numpy().astype(np.float64)  # [T, B, C, H, W]
        mu, sigma = u.mean((1, 3, 4)) - 1, u.std((1, 3, 4)).clip(1e-6)
        if measure == "overlap":
            layers.append((normal.cdf((1 + mu) / sigma) - normal.cdf((mu - 1) / sigma)).mean())
        else:  # the triangle by its definition, on a fine grid of the Gaussian
            z = np.linspace(-6, 6, 4001)
            weights = normal.pdf(z) / normal.pdf(z).sum()
            layers.append((weights * np.clip(1 - np.abs(mu[..., None] + sigma[..., None] * z), 0, None)).sum(-1).mean())
    assert before.item() == pytest.approx(np.mean(layers), abs=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before.backward()
    assert all(layer.synapse.weight.grad.abs().sum() > 0 for layer in model.layers())
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        term()[0].backward()
    assert term()[0] < before


def test_moments_do_not_depend_on_the_memory_layout_nor_much_on_the_precision() -> None:
    u = 1.3 * torch.randn(8, 6, 5, 5) + 0.4
    neuron = LIF(surrogate=make_surrogate("triangle"))
    found = {}
    for name, x in {"plain": u, "last": u.contiguous(memory_format=torch.channels_last), "bf16": u.bfloat16()}.items():
        x = x.requires_grad_()
        moments = empirical(Trace("layer", None, neuron, [LIFState(x, x)], x[None]))
        assert {m.dtype for m in moments} == {torch.float32}
        overlap(moments, make_surrogate("triangle")).sum().backward()
        found[name] = (*moments, x.grad.float())
    for plain, last, half in zip(*found.values(), strict=True):
        torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(half, plain, rtol=2e-2, atol=2e-3)
