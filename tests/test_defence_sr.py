"""Sparsity regularisation: a finite difference that is the gradient's 1-norm, taken on one and the same network."""

import math

import pytest
import torch
from conftest import small_recipe
from lightning_fabric import Fabric
from torch import Tensor, nn

from mpdsgr_deploy.defences import Step, build_defended
from mpdsgr_deploy.defences.sr import SparseGradients, SparseGradientSettings, best_wrong, confidence
from mpdsgr_deploy.training.epoch import Learner, batch_loss


def smooth_step() -> tuple[Step, nn.Module]:
    """A step of a smooth float64 model on five images of twelve pixels and four classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x, y = torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    return Step(lambda x, observe: model(x), x, y, x, model(x), [], 0, torch.Generator()), model


def test_value_against_a_loop_over_images() -> None:
    step, model = smooth_step()
    term = SparseGradients(SparseGradientSettings(lam=0.5)).term(step)
    squares = []
    for image, label in zip(step.x, step.y.tolist(), strict=True):
        image = image[None].clone().requires_grad_()
        logits = model(image)[0]
        rival = max((k for k in range(4) if k != label), key=lambda k: logits[k].item())

        def f(z: Tensor, label: int = label, rival: int = rival) -> Tensor:
            return z[label].exp() / (z[label].exp() + z[rival].exp())

        f(logits).backward()
        moved = image.detach() + 0.01 * image.grad.sign()
        squares.append(((f(model(moved)[0]) - f(logits)).item() / 0.01) ** 2)
    assert (term.name, term.weight) == ("sparsity", 0.5)
    assert term.value.item() == pytest.approx(sum(squares) / 5, rel=1e-9)


def test_the_difference_is_the_1_norm_of_the_gradient_and_reaches_the_weights() -> None:
    step, model = smooth_step()
    x = step.x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(
        confidence(logits, step.y, best_wrong(logits, step.y)).sum(), x, create_graph=True
    )
    exact = gradient.flatten(1).abs().sum(1).square().mean()
    term = SparseGradients(SparseGradientSettings(h=1e-6)).term(step)
    assert term.value.item() == pytest.approx(exact.item(), rel=1e-4)
    weights = [model[1].weight, model[3].weight]
    for found, expected in zip(
        torch.autograd.grad(term.value, weights), torch.autograd.grad(exact, weights), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_best_wrong_and_confidence_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    y = torch.tensor([0, 2])
    assert best_wrong(logits, y).tolist() == [2, 1]
    expected = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]
    assert confidence(logits, y, torch.tensor([2, 1])).tolist() == pytest.approx(expected)


def learned(
    defence: dict[str, object], encoding: str = "direct", fabric: Fabric | None = None, part: slice = slice(None)
) -> tuple[dict[str, Tensor], nn.Module]:
    """What the images `part` of one batch measure, and the model with their gradients."""
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    recipe = small_recipe(defence=defence, encoding={"name": encoding})
    torch.manual_seed(0)
    model, defences = build_defended(recipe, (1, 8, 8), 10)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters()))
    draw = torch.Generator().manual_seed(1)
    pixels, classes = torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8, generator=draw), torch.arange(16) % 10
    learner = Learner(fabric, recipe, wrapped, model, defences, optimizer)
    measured = batch_loss(learner, pixels[part], classes[part], 0, draw)
    fabric.backward(measured["loss"])
    return measured, model


def test_only_the_training_pass_enters_the_running_statistics() -> None:
    (_, plain), (measured, regularised) = learned({}), learned({"sr": {}})
    assert measured["sparsity"] > 0
    found = dict(regularised.named_buffers())
    assert all(torch.equal(found[name], buffer) for name, buffer in plain.named_buffers())


def test_a_stochastic_network_is_compared_under_the_same_noise() -> None:
    """With RSC's noise drawn anew at x + h v, with h tiny, the difference would be that of the draws over h."""
    measured, _ = learned({"sr": {"h": 1e-9}}, "rsc")
    assert measured["sparsity"] == 0
