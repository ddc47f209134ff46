"""The membrane potential constraint of TGO (Wang et al., arXiv 2602.20548, eq. 12 and 13).

    lam * sum over layers of the mean over time steps and neurons of max(0, delta - |U - V_th|)

It penalises each single potential near the threshold, whereas MPD-SGR penalises the mass of a distribution there. The
noisy neurons of the paper are not implemented, because their noise is not published.
"""

import math

import torch
from torch import Tensor

from mpdsgr_deploy.defences.base import Defence, Step, Term, register
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import NonNegative, Positive, Section
from mpdsgr_deploy.snn import Trace


class ThresholdGuardSettings(Section):
    """The weight lam in the last epoch, and the distance delta from the threshold, in units of U, without penalty.

    The paper uses lam = 0.6 for VGG11 and 0.4 for WRN-16; its delta is not published.
    """

    lam: NonNegative = 0.6
    delta: Positive = 0.5


@register("tgo", ThresholdGuardSettings)
class ThresholdGuard(Defence[ThresholdGuardSettings]):
    """The constraint, with a weight that rises along half a cosine from 0 in the first epoch to lam in the last."""

    def check(self, recipe: Recipe) -> None:
        self._last = max(1, recipe.training.epochs - 1)

    def read(self, trace: Trace) -> Tensor:
        penalties = [hinge(u, trace.neuron.v_threshold, self.settings.delta) for u, _ in trace.states]
        return torch.stack(penalties).mean()

    def term(self, step: Step) -> Term:
        weight = self.settings.lam * 0.5 * (1 - math.cos(math.pi * min(1, step.epoch / self._last)))
        return Term("threshold_guard", weight, torch.stack(step.readings).sum())


def hinge(u: Tensor, v_threshold: float, delta: float) -> Tensor:
    """Return the mean of max(0, delta - |U - V_th|) over potentials u of any shape."""
    return (delta - (u.float() - v_threshold).abs()).clamp(min=0).mean()
