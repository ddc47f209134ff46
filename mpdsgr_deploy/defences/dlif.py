"""Dynamic LIF neurons and a stable response to perturbation (DLIF; Ding et al., arXiv 2405.20694, ICML 2024).

Every layer learns an input gain a_t for each step, U_t = tau U_{t-1} (1 - O_{t-1}) + a_t I_t, and the loss gains

    rho * mean(Y^2),   Y_t = tau_y Y_{t-1} + (I_clean,t - I_perturbed,t),   Y_0 = 0

with the currents I of the last spiking layer, before their gain. The mean is over steps, images and neurons. With norm
"l1" it is the mean of |Y|: MPPD-TV-l1 (Lai et al., ICLR 2026), a paper that shows that Y is a total variation.
"""

from collections import deque
from typing import Literal

import torch
from torch import Tensor, nn

from mpdsgr_deploy.defences.base import Defence, Shape, Step, Term, register, replace_neurons
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.schema import NonNegative, Section, UnitInterval
from mpdsgr_deploy.snn import LIF, DerivedLIF, LIFState, Noise, Trace


class DynamicLIFSettings(Section):
    """The weight rho of the loss, which needs attacked images ([defence.at]), its leak tau_y (`tau`), and its norm."""

    rho: NonNegative = 1.0
    tau: UnitInterval = 0.99
    norm: Literal["l1", "l2"] = "l2"


class DynamicLIF(DerivedLIF):
    """LIF with a learned input gain per step, `gain` [T], initially 1."""

    time_invariant = False
    per_step = ("gain",)
    binary = True

    def __init__(self, lif: LIF, T: int) -> None:
        super().__init__(lif)
        self.gain = nn.Parameter(torch.ones(T))

    def forward(
        self, current: Tensor, state: LIFState | None = None, noise: Noise = None
    ) -> tuple[Tensor, list[LIFState]]:
        """Run `LIF.forward` on the amplified current, which must have T steps, because each gain belongs to a step."""
        gain = self.gain.to(current).view(-1, *[1] * (current.dim() - 1))
        return super().forward(gain * current, state, noise)


@register("dlif", DynamicLIFSettings)
class DynamicNeurons(Defence[DynamicLIFSettings]):
    """Learned input gains and, if training attacks images, the loss, which takes one more forward pass per step."""

    time_invariant = False

    def adapt(self, model: SpikingNet, shapes: dict[str, Shape]) -> None:
        replace_neurons(model, lambda layer: DynamicLIF(layer.neuron, model.T))
        self.last = model.layers()[-1].name

    def read(self, trace: Trace) -> Tensor | None:
        return trace.current if trace.layer == self.last else None

    def term(self, step: Step) -> Term | None:
        if step.x is step.clean or not self.settings.rho:
            return None
        last: deque[Tensor | None] = deque(maxlen=1)
        with torch.no_grad():  # the clean response is the constant target of the perturbed one
            step.forward(step.clean, lambda trace: last.append(trace.current))
        (perturbed,), (clean,) = step.readings, last
        # currents exist, because no kernel combines these neurons with normalisation
        assert clean is not None
        assert perturbed is not None
        total = leaky_integral(clean - perturbed, self.settings.tau)
        size = total.abs() if self.settings.norm == "l1" else total.square()
        return Term("perturbation", self.settings.rho, size.mean())


def leaky_integral(x: Tensor, tau: float) -> Tensor:
    """Return Y_t = tau Y_{t-1} + x_t for x [T, ...], from Y_0 = 0; float32 [T, ...]."""
    total, totals = torch.zeros_like(x[0], dtype=torch.float32), []
    for step in x.float():
        total = tau * total + step
        totals.append(total)
    return torch.stack(totals)
