"""Stochastic gating (StoG; Ding et al., AAAI 2024): each spike passes a gate that is open with a learned probability.

A layer's output is O_t * G_t with G_t ~ Bernoulli(p), drawn anew for every step, image and neuron, in training and at
test time; p in [0.1, 1] is learned per neuron. Gates do not affect the membrane: ungated spikes reset it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mpdsgr_deploy.defences.base import Defence, Shape, Step, Term, register, replace_neurons
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.schema import Count, NonNegative, Positive, Section
from mpdsgr_deploy.snn import LIF, DerivedLIF, LIFState, Noise, Trace
from mpdsgr_deploy.snn.draws import uniform

LOWEST = 0.1  # p stays in [LOWEST, 1]
EDGE = 1e-3  # the relaxation clips p to [EDGE, 1 - EDGE], where the log-odds are finite


class GatingSettings(Section):
    """The temperature of the relaxed gate, and the weight and number of epochs of the prior; p is learned as long."""

    temperature: Positive = 0.5
    prior: NonNegative = 5e-6
    epochs: Count = 100


class GatedLIF(DerivedLIF):
    """LIF with a gate after each neuron; `p` [C, ...] is the probability that the gate is open.

    The defence clamps p to [0.1, 1] after every step; the authors clamp it in the forward pass. p starts at 1, as
    theirs does, where all gates are open. There the gate has no gradient, so only the prior changes p at first.
    """

    stochastic = True

    def __init__(self, lif: LIF, shape: Shape, temperature: float) -> None:
        super().__init__(lif)
        self.p = nn.Parameter(torch.ones(shape))
        self.temperature = temperature

    def forward(
        self, current: Tensor, state: LIFState | None = None, noise: Noise = None
    ) -> tuple[Tensor, list[LIFState]]:
        """Return gated spikes [T, B, ...], and the T states of the ungated membrane."""
        spikes, states = super().forward(current, state, noise)
        u = uniform(len(spikes), spikes[0].float(), noise)
        gates = relaxed_gate(self.p, u, self.temperature) if self.training else (u < self.p).float()
        return spikes * gates.to(spikes), states


def relaxed_gate(p: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Return binary concrete gates in [0, 1] (Maddison et al., arXiv 1611.00712), differentiable in p.

    u: draws of U(0, 1) in any shape that p broadcasts to. As the temperature falls to 0, the gates become [u > 1 - p],
    which is Bernoulli(p).
    """
    return torch.sigmoid((torch.logit(p, EDGE) + torch.logit(u)) / temperature)


@register("stog", GatingSettings)
class StochasticGating(Defence[GatingSettings]):
    """Gates after every neuron, relaxed in training and 0 or 1 at test time, and a prior that closes them.

    The gradient of an attack passes through open gates, because a gate is a factor that does not depend on the image.
    An attack has to average over draws (EOT).
    """

    # False after the epochs of the prior: p then changes only by the optimiser's momentum, as in the authors' code
    learning = True

    def adapt(self, model: SpikingNet, shapes: dict[str, Shape]) -> None:
        temperature = self.settings.temperature
        replace_neurons(model, lambda layer: GatedLIF(layer.neuron, shapes[layer.name], temperature))
        for p in self.undecayed(model):
            # not requires_grad = False, because DDP waits for gradients of all parameters that had one at the start
            p.register_hook(lambda gradient: gradient if self.learning else torch.zeros_like(gradient))

    def undecayed(self, model: SpikingNet) -> list[nn.Parameter]:
        """Return every p, because weight decay would act as a second prior that is a hundred times as strong."""
        return [layer.neuron.p for layer in model.layers() if isinstance(layer.neuron, GatedLIF)]

    def read(self, trace: Trace) -> Tensor | None:
        return trace.neuron.p.square().sum() if isinstance(trace.neuron, GatedLIF) and self.learning else None

    def term(self, step: Step) -> Term | None:
        if not self.learning:
            return None
        return Term("gate_prior", self.settings.prior, 0.5 * torch.stack(step.readings).sum())

    @torch.no_grad()
    def after_step(self, model: SpikingNet, draw: torch.Generator) -> None:
        for p in self.undecayed(model):
            p.clamp_(LOWEST, 1)

    def begin_epoch(self, history: list[dict[str, Any]]) -> None:
        self.learning = len(history) < self.settings.epochs
