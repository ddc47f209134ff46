"""Adversarial training (AT): the images of a training step are PGD examples against the current model.

Source: Madry et al., arXiv 1706.06083. As in SNN-RAT and the papers that build on it, the loss is the cross-entropy on
the attacked images only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mpdsgr_deploy.attacks import pgd
from mpdsgr_deploy.attacks.torch_target import frozen, input_gradient
from mpdsgr_deploy.defences.base import Defence, register
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.schema import Count, Positive, Section, UnitInterval


@contextmanager
def deployed(model: SpikingNet, draw: torch.Generator) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from images [B, C, H, W] to logits [B, K] that runs a model as it will be deployed.

    Within the with block the model is in eval mode, simplified, and its weights get no gradient. draw: the generator
    for the noise of a stochastic model.
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
    """Train on PGD examples, which are made against the model in eval mode.

    Eval mode, because the examples should attack the network that will be deployed, and because the steps of the attack
    must not change tdBN's statistics.
    """

    adversarial = True

    def examples(self, model: SpikingNet, x: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
        config = self.settings

        def start(shape: tuple[int, ...]) -> Tensor:
            return (2 * torch.rand(shape, generator=draw) - 1).to(x.device)

        with deployed(model, draw) as network:
            target = partial(input_gradient, network)
            return pgd(target, x, y, eps=config.eps, step=config.step, steps=config.steps, draw=start)
