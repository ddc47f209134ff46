"""TRADES: the divergence by hand, the attack that climbs it, and what enters the step."""

import pytest
import torch
from conftest import small_recipe
from lightning_fabric import Fabric

from mpdsgr_deploy.defences import DEFENCES, Step, build_defended
from mpdsgr_deploy.defences.trades import Trades, TradesSettings, divergence
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.training.epoch import Learner, batch_loss

SHAPE = (1, 8, 8)


def test_the_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    torch.testing.assert_close(divergence(q.log(), p), torch.stack([expected, torch.zeros(())]), atol=1e-7, rtol=1e-5)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(16, *SHAPE, generator=draw), torch.arange(16) % 10


def test_the_attack_stays_in_the_ball_and_moves_the_answers_further_than_noise() -> None:
    torch.manual_seed(0)
    model, (trades,) = build_defended(
        small_recipe(defence={"trades": {"eps": 0.1, "step": 0.025, "steps": 10}}), SHAPE, 10
    )
    x, y = batch()
    model.train()
    with torch.no_grad():
        for _ in range(30):  # running statistics, without which no neuron fires in eval mode
            model(x)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert trades.examples(model, x, y, torch.Generator().manual_seed(2)) is x
    attacked = trades._attacked
    assert model.training
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())
    assert (attacked - x).abs().max() <= 0.1 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    model.eval()
    assert not torch.equal(trades.examples(model, x, y, torch.Generator().manual_seed(2)), x)  # for the score
    with torch.no_grad():
        clean = model(x).softmax(1)
        noisy = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).sign()).clip(0, 1)
        assert divergence(model(attacked), clean).mean() > 1.5 * divergence(model(noisy), clean).mean()


def test_a_step_trains_on_clean_images_and_adds_the_divergence() -> None:
    torch.manual_seed(0)
    recipe = small_recipe(defence={"trades": {"eps": 0.1, "step": 0.05, "weight": 3.0}})
    model, defences = build_defended(recipe, SHAPE, 10)
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters()))
    x, y = batch()
    learner = Learner(fabric, recipe, wrapped, model, defences, optimizer)
    measured = batch_loss(learner, (255 * x).to(torch.uint8), y, 0, torch.Generator().manual_seed(1))
    assert measured["divergence"] > 0
    expected = measured["cross_entropy"] + 3 * measured["divergence"]
    torch.testing.assert_close(measured["loss"], expected)


def test_an_attack_that_moves_nothing_costs_nothing() -> None:
    trades = Trades(TradesSettings())
    x, y = batch()
    logits = torch.randn(16, 10)
    trades._attacked = x
    step = Step(lambda x, observe: logits, x, y, x, logits, [], 0, torch.Generator())
    assert trades.term(step).value.item() == pytest.approx(0, abs=1e-6)


def test_not_beside_adversarial_training() -> None:
    with pytest.raises(InputError, match="remove one of the two"):
        build_defended(small_recipe(defence={"trades": {}, "at": {}}), SHAPE, 10)
    assert DEFENCES["trades"].adversarial
