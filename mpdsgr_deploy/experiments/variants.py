"""Variants of the paper's regulariser and networks of several depths, which only the studies' recipes use.

A variant that proves useful moves to `mpdsgr_deploy.defences`; the others stay, so that results can be reproduced.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mpdsgr_deploy.defences.base import Defence, Step, Term, register
from mpdsgr_deploy.defences.mpd_sgr import ReachReading, potentials, reach_overlaps
from mpdsgr_deploy.defences.sr import best_wrong
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.models.spiking_net import register as register_model
from mpdsgr_deploy.models.vgg import P, vgg
from mpdsgr_deploy.mpd import ESTIMATORS, Moments, layer_moments, mean_of_layers
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import NonNegative, Number, Positive, Section
from mpdsgr_deploy.snn import Trace
from mpdsgr_deploy.snn.expected_surrogate import interval_mass, normal_cdf

DEPTHS = (3, 5, 7, 9, 11)

for depth in DEPTHS:  # 32 channels, halved once, then 64: vgg-small on 8x8 images is the one of depth 3
    plan: tuple[int | str, ...] = (32, P, *[64] * (depth - 1))
    register_model(f"plain-{depth}")(partial(vgg, plan=plan, hidden=()))


class VariantSettings(Section):
    """How a variant differs from eta * Omega.

    centre: of the window, the threshold (as derived) or 0 (as the paper prints it). reaches: which of mean and
    deviation receives the gradient. widest: the deviation, in thresholds, beyond which widening no longer counts.
    floor: firing rate of a layer below which its shortfall, as a share of the floor, is added. anneal: eta falls to 0
    ("out") or rises from 0 ("in") linearly over the epochs.
    """

    estimator: str = "empirical"
    eta: NonNegative = 0.5
    centre: Literal["threshold", "zero"] = "threshold"
    reaches: Literal["both", "mean", "deviation"] = "both"
    widest: Positive | None = None
    floor: Annotated[Number, Field(gt=0, lt=1)] | None = None
    anneal: Literal["none", "in", "out"] = "none"


@register("mpd-sgr-variant", VariantSettings)
class OverlapVariant(Defence[VariantSettings]):
    """eta * the mean over layers of an overlap."""

    def check(self, recipe: Recipe) -> None:
        choose("estimator", ESTIMATORS, self.settings.estimator)
        self.epochs = recipe.training.epochs

    def read(self, trace: Trace) -> Tensor | None:
        """Return the overlap of a layer, and its shortfall from the floor."""
        config = self.settings
        moments = layer_moments(trace, ESTIMATORS[config.estimator])
        if moments is None:
            return None
        mu, sigma = moments
        shortfall = mu.new_zeros(())
        # the mean excess of a Gaussian over the threshold, which is differentiable, unlike the spikes
        if config.floor is not None:
            shortfall = (1 - normal_cdf(mu / sigma).mean() / config.floor).clamp(min=0)
        mu = mu + trace.neuron.v_threshold if config.centre == "zero" else mu
        mu = mu.detach() if config.reaches == "deviation" else mu
        sigma = sigma.detach() if config.reaches == "mean" else sigma
        sigma = sigma if config.widest is None else sigma.clamp(max=config.widest * trace.neuron.v_threshold)
        return interval_mass(mu, sigma, trace.neuron.surrogate.half_width).mean() + shortfall

    def term(self, step: Step) -> Term:
        done = step.epoch / self.epochs
        eta = self.settings.eta * {"none": 1.0, "in": done, "out": 1 - done}[self.settings.anneal]
        return Term("overlap", eta, mean_of_layers(step.readings))


class MarginSettings(Section):
    """eta weighs the term; width: of the window, in deviations of the channel's potentials at the step.

    salient: a neuron's weight is the size of the margin's surrogate gradient in its current; else all weigh the same.
    """

    eta: NonNegative = 0.5
    width: Positive = 0.5
    salient: bool = False


@register("membrane-margin", MarginSettings)
class MembraneMargin(Defence[MarginSettings]):
    """eta * the weighted mean of max(0, 1 - |V| / (width sigma)), which moves potentials away from the threshold.

    sigma is that of the batch, per channel and step, and carries a gradient, so that scaling all potentials around the
    threshold changes nothing. Potentials above the threshold are moved up, those below it down.
    """

    def read(self, trace: Trace) -> Any:
        v = torch.stack([u for u, _ in trace.states]) - trace.neuron.v_threshold
        sigma = empirical_moments(trace).sigma
        shape = (*sigma.shape[:1], 1, sigma.shape[1], *[1] * (v.dim() - 3))
        return currents_of(trace), (1 - v.abs() / (self.settings.width * sigma.view(shape))).clamp(min=0)

    def term(self, step: Step) -> Term:
        currents, inside = zip(*step.readings, strict=True)
        weights: list[Tensor] = [torch.ones_like(window) for window in inside]
        if self.settings.salient:
            weights = saliency(step, currents)
        return Term("inside", self.settings.eta, weighted(inside, weights))


class SalientSettings(Section):
    """eta weighs the term."""

    eta: NonNegative = 4.0


@register("salient-reach", SalientSettings)
class SalientReach(Defence[SalientSettings]):
    """MPD-SGR's window `reach`, with steps and channels weighted by the effect of their currents on the margin.

    Flips that matter for the class count most. The weights carry no gradient.
    """

    def check(self, recipe: Recipe) -> None:
        if "at" not in recipe.defence:
            raise InputError("salient-reach needs an attack in training; add [defence.at]")

    def read(self, trace: Trace) -> Any:
        return currents_of(trace), ReachReading(trace.layer, empirical_moments(trace), potentials(trace))

    def term(self, step: Step) -> Term:
        currents, readings = zip(*step.readings, strict=True)
        weights = [w.mean((1, *range(3, w.dim()))) for w in saliency(step, currents)]
        return Term("salient_omega", self.settings.eta, weighted(reach_overlaps(step, readings), weights))


def empirical_moments(trace: Trace) -> Moments:
    """Return mean and deviation of a layer's potentials, which exist for every layer."""
    moments = layer_moments(trace, ESTIMATORS["empirical"])
    assert moments is not None
    return moments


def currents_of(trace: Trace) -> Tensor:
    """Return a layer's currents [T, B, C, ...]. Raises InputError if the GPU's kernel did not write them."""
    if trace.current is None:
        raise InputError("this variant reads the input currents, which the GPU kernel does not store; train on a CPU")
    return trace.current


def saliency(step: Step, currents: Sequence[Tensor]) -> list[Tensor]:
    """Return the size of the margin's surrogate gradient in each current, in the currents' shape, detached."""
    rival = best_wrong(step.logits, step.y)
    margin = (step.logits.gather(1, step.y[:, None]) - step.logits.gather(1, rival[:, None])).sum()
    return [g.abs().float() for g in torch.autograd.grad(margin, currents, retain_graph=True)]


def weighted(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the weighted mean of each layer, averaged over the layers."""
    means = [(w * x).sum() / w.sum().clamp(min=1e-12) for w, x in zip(weights, values, strict=True)]
    return torch.stack(means).mean()
