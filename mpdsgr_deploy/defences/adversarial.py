"""Adversarial training (AT): the images of a training step are PGD examples of the current model."""

import torch
from torch import Tensor, nn

from mpdsgr_deploy.attacks import pgd
from mpdsgr_deploy.attacks.torch_target import input_gradient
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.recipe import Defence


def adversarial_examples(model: nn.Module, x: Tensor, y: Tensor, config: Defence, start: torch.Generator) -> Tensor:
    """PGD with random start on x [B, C, H, W] in [0, 1]; the model is in eval mode meanwhile.

    Eval mode: the examples are made for the network that will be deployed, and tdBN's statistics see no attack step.
    """

    def target(x: Tensor, y: Tensor) -> Gradient:
        return input_gradient(model, x, y)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return (2 * torch.rand(shape, generator=start) - 1).to(x.device)

    was_training = model.training
    model.eval()
    adversarial = pgd(target, x, y, eps=config.eps, step=config.step, steps=config.steps, draw=draw)
    model.train(was_training)
    return adversarial
