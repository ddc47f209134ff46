import pytest
import torch
from torch import nn

from mpdsgr_deploy.snn import LIF, LIFState, SpikingLayer, TdBN, Trace, fold_time, lif
from mpdsgr_deploy.snn.encoding import Direct
from mpdsgr_deploy.snn.surrogate import make_surrogate

CURRENT = torch.tensor([0.6, 0.8, 1.5, -0.2, 0.9])[:, None]  # [T, B=1]


def trace_of(reset: str, **overrides: float) -> list[LIFState]:
    settings = {"tau": 0.5, "v_threshold": 1.0, **overrides}
    return lif(CURRENT, reset=reset, surrogate=make_surrogate("triangle"), **settings)


def test_hard_reset_by_hand() -> None:
    # u1 = 0.6                            no spike
    # u2 = 0.5 * 0.6 + 0.8 = 1.1          spike
    # u3 = 0 + 1.5 = 1.5                  spike
    # u4 = 0 - 0.2 = -0.2                 no spike
    # u5 = 0.5 * -0.2 + 0.9 = 0.8         no spike
    states = trace_of("hard")
    assert [s.u.item() for s in states] == pytest.approx([0.6, 1.1, 1.5, -0.2, 0.8])
    assert [s.spikes.item() for s in states] == [0, 1, 1, 0, 0]


def test_soft_reset_by_hand() -> None:
    # u1 = 0.6                            no spike
    # u2 = 0.5 * 0.6 + 0.8 = 1.1          spike
    # u3 = 0.5 * (1.1 - 1) + 1.5 = 1.55   spike
    # u4 = 0.5 * (1.55 - 1) - 0.2 = 0.075 no spike
    # u5 = 0.5 * 0.075 + 0.9 = 0.9375     no spike
    states = trace_of("soft")
    assert [s.u.item() for s in states] == pytest.approx([0.6, 1.1, 1.55, 0.075, 0.9375])
    assert [s.spikes.item() for s in states] == [0, 1, 1, 0, 0]


def test_soft_reset_subtracts_the_threshold_whatever_it_is() -> None:
    # V_th = 0.7, tau = 1: 0.6 | 1.4 spike | 0.7 + 1.5 = 2.2 spike | 1.5 - 0.2 = 1.3 spike | 0.6 + 0.9 = 1.5 spike
    states = trace_of("soft", tau=1.0, v_threshold=0.7)
    assert [s.u.item() for s in states] == pytest.approx([0.6, 1.4, 2.2, 1.3, 1.5])
    assert [s.spikes.item() for s in states] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_state_carries_a_sequence_across_calls(reset: str) -> None:
    current = torch.randn(6, 4, 3)
    neuron = LIF(tau=0.8, reset=reset, surrogate=make_surrogate("triangle"))
    whole, _ = neuron(current)
    first, states = neuron(current[:2])
    second, _ = neuron(current[2:], states[-1])
    assert torch.equal(whole, torch.cat([first, second]))


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_gradient_through_time_by_hand(reset: str) -> None:
    """d sum(O) / d I by the chain rule written out, reset path included."""
    tau = 0.6
    current = torch.tensor([0.7, 0.9, 0.4, 1.2], dtype=torch.float64).requires_grad_()
    states = lif(current[:, None], tau=tau, v_threshold=1.0, reset=reset, surrogate=make_surrogate("triangle"))
    sum(s.spikes.sum() for s in states).backward()

    carried, expected = 0.0, []
    for u, o in reversed([(s.u.item(), s.spikes.item()) for s in states]):
        surrogate = max(0.0, 1 - abs(u - 1.0))
        kept, taken = (tau * (1 - o), -tau * u) if reset == "hard" else (tau, -tau)
        carried = surrogate * (1 + taken * carried) + kept * carried  # d (all later spikes) / d u_t
        expected.append(carried)
    assert current.grad.tolist() == pytest.approx(expected[::-1])


def test_tdbn_against_a_direct_computation() -> None:
    T, B, C, alpha, v_threshold = 3, 5, 4, 0.7, 1.3
    x = torch.randn(T, B, C, 6, 6) * 3 + 2
    norm = TdBN(C, v_threshold=v_threshold, alpha=alpha)
    nn.init.uniform_(norm.weight, -1, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    found = fold_time(norm, x)

    mean = x.mean((0, 1, 3, 4), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 1, 3, 4), keepdim=True)
    scale, shift = (p.detach().view(1, 1, C, 1, 1) for p in (norm.weight, norm.bias))
    expected = scale * alpha * v_threshold * (x - mean) / (variance + 1e-5).sqrt() + shift
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    n = x.numel() / C
    torch.testing.assert_close(norm.running_mean, 0.1 * mean.flatten())
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance.flatten() * n / (n - 1))

    norm.eval()
    running = norm.running_mean.view(1, 1, C, 1, 1), norm.running_var.view(1, 1, C, 1, 1)
    expected = scale * alpha * v_threshold * (x - running[0]) / (running[1] + 1e-5).sqrt() + shift
    torch.testing.assert_close(fold_time(norm, x), expected, rtol=1e-5, atol=1e-5)


def test_direct_encoding_repeats_the_image() -> None:
    x = torch.rand(2, 3, 4, 4)
    encoded = Direct(5, x.shape[1])(x, lambda x: x)
    assert encoded.shape == (5, 2, 3, 4, 4)
    assert all(torch.equal(step, x) for step in encoded)


def test_observing_a_layer_changes_nothing_and_leaves_nothing_behind() -> None:
    layer = SpikingLayer("layer", nn.Linear(6, 4), None, LIF(surrogate=make_surrogate("triangle"))).eval()
    x = torch.randn(3, 2, 6)
    seen: list[Trace] = []
    assert torch.equal(layer(x, seen.append), layer(x))
    (trace,) = seen
    assert len(trace.states) == 3
    assert trace.states[0].u.shape == (2, 4)
    assert torch.equal(trace.states[0].u, layer.synapse(x[0]))
