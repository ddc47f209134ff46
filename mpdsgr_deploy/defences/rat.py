"""The weight regularisation of regularised adversarial training (SNN-RAT; Ding et al., NeurIPS 2022).

After every optimiser step each weight, seen as a matrix W [out, fan-in], takes a step towards orthonormal rows,

    W <- (1 + b) W - b W W^T W,

which moves each singular value s to s (1 + b - b s^2), that is, towards 1. The adversarial training of the same paper
is the defence `at`; a recipe for SNN-RAT switches on both.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mpdsgr_deploy.defences.base import Defence, register
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import Positive, Section

SAMPLED_FROM, SHARE = 200, 0.3  # in a linear layer of at least 200 rows, a step changes only a random 30 % of them


class RetractionSettings(Section):
    """The step size b; SNN-RAT and the papers that build on it use 5e-4 to 1e-3."""

    b: Positive = 1e-3


@runtime_checkable
class Projected(Protocol):
    """A module whose parameters are constrained to a set, and which can project them onto this set."""

    def project(self) -> None:
        """Move the parameters to the nearest point of the set, in place."""


@register("rat", RetractionSettings)
class Retraction(Defence[RetractionSettings]):
    """Retract the weights of all convolutions and linear layers, and project the parameters of `Projected` modules."""

    def check(self, recipe: Recipe) -> None:
        if recipe.training.weight_decay:
            raise InputError(
                f"rat replaces weight decay and training.weight_decay is {recipe.training.weight_decay}; "
                f"set training.weight_decay = 0"
            )

    @torch.no_grad()
    def after_step(self, model: SpikingNet, draw: torch.Generator) -> None:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(retracted(module.weight.flatten(1), self.settings.b).view_as(module.weight))
            elif isinstance(module, nn.Linear):
                rows = sampled_rows(module.out_features, draw).to(module.weight.device)
                module.weight[rows] = retracted(module.weight[rows], self.settings.b)
            elif isinstance(module, Projected):
                module.project()


def retracted(w: Tensor, b: float) -> Tensor:
    """Return (1 + b) W - b W W^T W for W [m, n], computed with the smaller of its two Gram matrices."""
    rows, columns = w.shape
    cubed = (w @ w.T) @ w if rows <= columns else w @ (w.T @ w)
    return (1 + b) * w - b * cubed


def sampled_rows(rows: int, draw: torch.Generator) -> Tensor:
    """Return the indices of all rows of a small linear layer, or of a random 30 % of the rows of a large one."""
    if rows < SAMPLED_FROM:
        return torch.arange(rows)
    return torch.randperm(rows, generator=draw)[: int(SHARE * rows)]
