"""FEEL-SNN (Xu et al., NeurIPS 2024): frequency encoding and an evolutionary leak.

The encoding is `encoding.name = "frequency"`: a low-pass of the image per step, by default of a falling radius. This
file implements the leak: every neuron learns one leak per step, U_t = leak_t U_{t-1} (1 - O_{t-1}) + I_t.
"""

import torch
from torch import Tensor, nn

from mpdsgr_deploy.defences.base import Defence, Shape, register, replace_neurons
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import NonNegative, Section
from mpdsgr_deploy.snn import LIF, DerivedLIF


class FEELSettings(Section):
    """The initial value of every leak, which replaces neuron.tau; the authors use 1."""

    init: NonNegative = 1.0


class LeakyLIF(DerivedLIF):
    """LIF with a learned leak per step and neuron, `leaks` [T, C, ...].

    Leaks are not limited to [0, 1], as in the authors' code, and have weight decay like any other parameter. leaks[0]
    has an effect only if a state is passed to `forward`, because the first step otherwise starts at rest.
    """

    time_invariant = False
    per_step = ("leaks",)
    binary = True

    def __init__(self, lif: LIF, T: int, shape: Shape, init: float) -> None:
        super().__init__(lif)
        self.leaks = nn.Parameter(torch.full((T, *shape), init))

    @property
    def leak(self) -> Tensor:
        """The learned leaks [T, C, ...]."""
        return self.leaks


@register("feel", FEELSettings)
class FEEL(Defence[FEELSettings]):
    """Train a leak per neuron and step, on images with frequency encoding."""

    time_invariant = False

    def check(self, recipe: Recipe) -> None:
        if recipe.encoding.name != "frequency":
            raise InputError(f"feel encodes by frequency, not {recipe.encoding.name}; set encoding.name = 'frequency'")

    def adapt(self, model: SpikingNet, shapes: dict[str, Shape]) -> None:
        init = self.settings.init
        replace_neurons(model, lambda layer: LeakyLIF(layer.neuron, model.T, shapes[layer.name], init))
