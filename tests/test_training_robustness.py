"""Validation images under PGD after each epoch: the accuracy that the saved network has, at no cost to training."""

from pathlib import Path

import torch
from conftest import small_recipe

from mpdsgr_deploy.checkpoint import VALIDATION_PGD, load_checkpoint
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.data.batches import generator, to_unit
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.training import train

ATTACKED_IMAGES, BATCH = 30, 20


def test_accuracy_is_that_of_the_saved_network_under_pgd_written_out(tmp_path: Path) -> None:
    recipe = small_recipe(
        training={"epochs": 2, "attacked_images": ATTACKED_IMAGES, "average": 0.9},
        validation={"batch_size": BATCH},
        attack={"eps": 0.05, "step": 0.02, "steps": 4},
    )
    train(recipe, tmp_path / "run")
    checkpoint, model = load_network(tmp_path / "run" / "last")
    _, validation = load_training(recipe.data)
    right = 0
    for number in range(2):
        part = slice(number * BATCH, min((number + 1) * BATCH, ATTACKED_IMAGES))
        x, y = to_unit(torch.as_tensor(validation.pixels[part])), torch.as_tensor(validation.classes[part])
        draw = generator(recipe.training.seed, "attacked validation", 1, number)
        adversarial = (x + 0.05 * (2 * torch.rand(x.shape, generator=draw) - 1)).clamp(0, 1)
        for _ in range(4):
            adversarial.requires_grad_()
            loss = torch.nn.functional.cross_entropy(model(adversarial), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, adversarial)
            adversarial = adversarial.detach() + 0.02 * gradient.sign()
            adversarial = torch.clamp(torch.minimum(torch.maximum(adversarial, x - 0.05), x + 0.05), 0, 1)
        right += int((model(adversarial).argmax(1) == y).sum())
    assert checkpoint.curve[VALIDATION_PGD][-1] == right / ATTACKED_IMAGES
    assert 0 < right < ATTACKED_IMAGES


def test_attacked_images_leave_training_as_it_is(tmp_path: Path) -> None:
    attack = {"eps": 0.1, "steps": 1, "step": 0.1}
    plain, attacked = (
        small_recipe(training={"epochs": 1, "attacked_images": images}, attack=attack) for images in (0, 10)
    )
    train(plain, tmp_path / "plain")
    train(attacked, tmp_path / "attacked")
    first, second = (load_checkpoint(tmp_path / name / "last") for name in ("plain", "attacked"))
    assert first.weights_sha256 == second.weights_sha256
    assert VALIDATION_PGD in second.curve
    assert VALIDATION_PGD not in first.curve
