"""TRADES (Zhang et al., arXiv 1901.08573, eq. 5): cross-entropy on clean images, and the effect of an attack.

weight * KL(softmax f(x) || softmax f(x')),   x' = argmax of the same divergence within eps of x
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mpdsgr_deploy.attacks import pgd
from mpdsgr_deploy.attacks.torch_target import input_gradient
from mpdsgr_deploy.defences.adversarial import AdversarialSettings, deployed
from mpdsgr_deploy.defences.base import Defence, Step, Term, register
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import NonNegative

START = 0.001  # standard deviation of the noise added to x as a start, because the divergence has no gradient at x


class TradesSettings(AdversarialSettings):
    """The settings of the attack, and the weight of the divergence (1 / lambda in the paper)."""

    weight: NonNegative = 6.0


@register("trades", TradesSettings)
class Trades(Defence[TradesSettings]):
    """Train on clean images with the divergence as a term, which takes one attack and one forward pass per step.

    The attack is made against the model in eval mode, as in adversarial training. Only the clean pass updates the
    running statistics; in the authors' code both passes do.
    """

    adversarial = True

    def __init__(self, settings: TradesSettings) -> None:
        super().__init__(settings)
        self._attacked: Tensor | None = None  # attacked images of the batch, from `examples` to `term`

    def check(self, recipe: Recipe) -> None:
        if "at" in recipe.defence:
            raise InputError(
                "trades needs the clean images beside its own attack, and at replaces them by attacked ones; remove "
                "one of the two"
            )

    def examples(self, model: SpikingNet, x: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
        """Return x itself in training, whose attacked images go into the loss, and attacked images in eval mode."""
        attacked = self._furthest(model, x, draw)
        if not model.training:
            return attacked
        self._attacked = attacked
        return x

    def _furthest(self, model: SpikingNet, x: Tensor, draw: torch.Generator) -> Tensor:
        config = self.settings

        def start(shape: tuple[int, ...]) -> Tensor:
            return (START / config.eps * torch.randn(shape, generator=draw)).to(x.device)

        with deployed(model, draw) as network:
            target = partial(input_gradient, network, loss=divergence)
            with torch.no_grad():
                clean = network(x).float().softmax(1)
            return pgd(target, x, clean, eps=config.eps, step=config.step, steps=config.steps, draw=start)

    def term(self, step: Step) -> Term:
        assert self._attacked is not None
        attacked_logits = step.forward(self._attacked, None)
        return Term("divergence", self.settings.weight, divergence(attacked_logits, step.logits.softmax(1)).mean())


def divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return KL(probabilities || softmax of logits) [B], both [B, K]."""
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="none").sum(1)
