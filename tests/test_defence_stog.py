"""Stochastic gating: the gates' statistics, their relaxation, what learns them and what leaves them alone."""

import pytest
import torch
from conftest import small_recipe
from lightning_fabric import Fabric
from scipy.stats import binom, kstest

from mpdsgr_deploy.data import Images
from mpdsgr_deploy.defences import Step, build_defended
from mpdsgr_deploy.defences.stog import GatedLIF, StochasticGating, relaxed_gate
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.snn import LIF, Reader
from mpdsgr_deploy.snn.surrogate import make_surrogate
from mpdsgr_deploy.training.training_run import _learner

SHAPE = (1, 8, 8)


def gated(p: list[float], *, training: bool) -> GatedLIF:
    """Neurons in a row with these gates; a current of 2 makes each of them fire at every step."""
    neuron = GatedLIF(LIF(surrogate=make_surrogate("triangle")), (len(p),), 0.5).train(training)
    neuron.p.data = torch.tensor(p)
    return neuron


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gates_at_test_time_are_bernoulli_of_p() -> None:
    p = [0.1, 0.4, 0.75, 1.0]
    T, B = 5, 4000
    spikes, states = gated(p, training=False)(torch.full((T, B, 4), 2.0), noise=seeded(0))
    assert set(spikes.unique().tolist()) == {0, 1}
    for rate, count in zip(p, spikes.sum((0, 1)).tolist(), strict=True):
        low, high = binom.interval(0.9999, T * B, rate)
        assert low <= count <= high
    assert all((s.spikes == 1).all() for s in states)  # the reset sees every spike, whatever its gate did


def test_gates_are_drawn_for_every_step_image_and_neuron_and_repeat_with_the_seed() -> None:
    neuron = gated([0.5] * 64, training=False)
    current = torch.full((3, 4, 64), 2.0)
    gates = neuron(current, noise=seeded(0))[0]
    assert torch.equal(neuron(current, noise=seeded(0))[0], gates)
    assert not torch.equal(neuron(current, noise=seeded(1))[0], gates)
    rows = gates.flatten(0, 1)  # of each step and image
    assert len(rows.unique(dim=0)) == 12
    agreement = (rows[:, None] == rows).float().mean(2)[~torch.eye(12, dtype=torch.bool)]
    assert (agreement - 0.5).abs().max() < 0.3  # 64 independent coins agree 32 +- 4 times


def test_relaxed_gates_follow_the_binary_concrete_distribution() -> None:
    """G < g means logit(u) < t logit(g) - logit(p), and logit(u) is logistic."""
    p, temperature = 0.3, 0.5
    u = torch.rand(20_000, generator=seeded(0), dtype=torch.float64)
    gates = relaxed_gate(torch.tensor(p, dtype=torch.float64), u, temperature)
    assert 0 <= gates.min() < 0.01 < 0.99 < gates.max() <= 1

    def cdf(g: torch.Tensor) -> torch.Tensor:
        odds = torch.logit(torch.as_tensor(g)) * temperature - torch.logit(torch.tensor(p, dtype=torch.float64))
        return torch.sigmoid(odds)

    assert kstest(gates.numpy(), lambda g: cdf(g).numpy()).pvalue > 0.01


def test_relaxed_gates_tend_to_bernoulli_with_the_temperature() -> None:
    p = torch.tensor([0.2, 0.6, 0.9])
    u = torch.rand(5000, 3, generator=seeded(0))
    hard = (u > 1 - p).float()
    distances = [(relaxed_gate(p, u, temperature) - hard).abs().mean().item() for temperature in (1, 0.5, 0.1, 1e-4)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3


def test_the_gradient_of_a_relaxed_gate_by_hand() -> None:
    p = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.6, 0.1], dtype=torch.float64)
    gates = relaxed_gate(p, u, 0.5)
    gates.sum().backward()
    expected = (gates * (1 - gates) / 0.5 / (p * (1 - p))).detach()
    torch.testing.assert_close(p.grad, expected)
    ends = torch.tensor([0.1, 1.0], requires_grad=True)
    relaxed_gate(ends, torch.tensor([0.0, 0.0]), 0.5).sum().backward()
    assert torch.isfinite(ends.grad).all()


def test_training_gates_are_relaxed_and_an_attack_passes_open_gates_only() -> None:
    current = torch.full((2, 3, 4), 1.5, requires_grad=True)
    relaxed, _ = gated([0.5] * 4, training=True)(current, noise=seeded(0))
    assert ((relaxed > 0) & (relaxed < 1)).any()
    spikes, _ = gated([0.5] * 4, training=False)(current, noise=seeded(0))
    spikes[-1].sum().backward()
    assert torch.equal(current.grad[-1] != 0, spikes[-1] == 1)


def build(epochs: int = 100) -> tuple[SpikingNet, StochasticGating]:
    torch.manual_seed(0)
    model, (defence,) = build_defended(small_recipe(defence={"stog": {"epochs": epochs}}), SHAPE, 10)
    return model, defence


def test_p_starts_open_has_the_shape_of_the_neurons_and_stays_in_range() -> None:
    model, defence = build()
    assert model.stochastic
    gates = defence.undecayed(model)
    assert [tuple(p.shape) for p in gates] == [(8, 8, 8), (16, 4, 4), (16, 4, 4)]
    assert all((p == 1).all() for p in gates)
    for p in gates:
        p.data = torch.linspace(-1, 2, p.numel()).view_as(p)
    defence.after_step(model, torch.Generator())
    assert all((p.min().item(), p.max().item()) == (pytest.approx(0.1), 1) for p in gates)


def test_the_prior_by_hand_and_its_end() -> None:
    model, defence = build(epochs=2)
    gates = defence.undecayed(model)
    gates[0].data.fill_(0.5)
    readings: list = []
    logits = model(torch.rand(4, *SHAPE), Reader(defence.read, readings.append), seeded(0))
    step = Step(model, *[torch.zeros(4)] * 3, logits, readings, 0, torch.Generator())
    term = defence.term(step)
    assert (term.name, term.weight) == ("gate_prior", 5e-6)
    assert term.value.item() == pytest.approx(0.5 * (512 * 0.25 + 256 + 256))
    term.value.backward()
    assert all(torch.equal(p.grad, p) for p in gates)

    for finished, learning in ((1, True), (2, False)):
        defence.begin_epoch([{}] * finished)
        assert (defence.term(step) is not None) is learning
        model.zero_grad()
        model(torch.rand(4, *SHAPE), None, seeded(0)).square().sum().backward()
        assert bool(gates[0].grad.abs().max() > 0) is learning


def test_weight_decay_leaves_p_alone() -> None:
    recipe = small_recipe(defence={"stog": {}}, training={"lr": 1.0, "weight_decay": 0.1, "momentum": 0.0})
    images = Images(torch.zeros(2, *SHAPE, dtype=torch.uint8).numpy(), torch.tensor([0, 1]).numpy(), ("a", "b"))
    learner = _learner(Fabric(accelerator="cpu", devices=1), recipe, images)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    for p in learner.model.parameters():
        p.grad = torch.zeros_like(p)
    learner.optimizer.step()
    for name, p in learner.model.named_parameters():
        torch.testing.assert_close(p, before[name] if name.endswith("neuron.p") else 0.9 * before[name])
