"""Adversarial training (AT): the images of a training step are PGD examples of the current model.

Madry et al., arXiv 1706.06083, in the setting of the SNN-RAT family: cross-entropy on the attacked images only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mpdsgr_deploy.attacks import pgd
from mpdsgr_deploy.attacks.torch_target import frozen, input_gradient
from mpdsgr_deploy.defences.base import Defence, register
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.schema import Count, Positive, Section, UnitInterval


@contextmanager
def deployed(model: SpikingNet, draw: torch.Generator) -> Iterator[Callable[[Tensor], Tensor]]:
    """Return a function from images to logits that runs a model in training as it will be deployed, for attacks.

    The model is in eval mode, simplified, and without gradients of the weights. draw: the noise of a stochastic model.
    """
    with frozen(model):
        simplified = simplify(model)
        yield lambda x: simplified(x, None, draw)


class AdversarialSettings(Section):
    """PGD with a random start in the L-infinity ball of radius eps, pixels in [0, 1]."""

    eps: UnitInterval = 2 / 255
    steps: Count = 2
    step: Positive = 1 / 255


@register("at", AdversarialSettings)
class AdversarialTraining(Defence[AdversarialSettings]):
    """Trains on PGD examples, made for the model in eval mode.

    Eval mode: the examples are made for the network that will be deployed, and tdBN's statistics see no attack step.
    """

    adversarial = True

    def examples(self, model: SpikingNet, x: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
        config = self.settings

        def start(shape: tuple[int, ...]) -> Tensor:
            return (2 * torch.rand(shape, generator=draw) - 1).to(x.device)

        with deployed(model, draw) as network:

            def target(x: Tensor, y: Tensor) -> Gradient:
                return input_gradient(network, x, y)

            return pgd(target, x, y, eps=config.eps, step=config.step, steps=config.steps, draw=start)
