"""Variants of the paper's regulariser, and networks of several depths, which only the recipes of studies use.

A variant that proves useful moves to `mpdsgr_deploy.defences`. The others stay so that results can be reproduced.
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

for depth in DEPTHS:  # a layer of 32 channels, pooling, then layers of 64; on 8x8 images, depth 3 is vgg-small
    plan: tuple[int | str, ...] = (32, P, *[64] * (depth - 1))
    register_model(f"plain-{depth}")(partial(vgg, plan=plan, hidden=()))


class VariantSettings(Section):
    """How a variant differs from the regulariser eta * Omega.

    centre: the centre of the window, the threshold (as derived) or 0 (as the paper prints it). reaches: which of mean
    and deviation get a gradient. widest: a deviation, in thresholds, above which a larger one changes nothing. floor: a
    firing rate; the shortfall of a layer that fires less, as a share of the floor, is added. anneal: eta falls to 0
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
    """The loss term eta * (overlap + shortfall), averaged over layers; see `VariantSettings`."""

    def check(self, recipe: Recipe) -> None:
        choose("estimator", ESTIMATORS, self.settings.estimator)
        self.epochs = recipe.training.epochs

    def read(self, trace: Trace) -> Tensor | None:
        """Return a layer's overlap plus its shortfall from the floor; None if the estimator does not describe it."""
        config = self.settings
        moments = layer_moments(trace, ESTIMATORS[config.estimator])
        if moments is None:
            return None
        mu, sigma = moments
        shortfall = mu.new_zeros(())
        # the firing rate of Gaussian potentials, which is differentiable, unlike the spikes
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
    """eta: weight of the term. width: of the window, in deviations of the channel's potentials at the step.

    salient: weigh neurons by the absolute surrogate gradient of the margin in their current; else all equally.
    """

    eta: NonNegative = 0.5
    width: Positive = 0.5
    salient: bool = False


@register("membrane-margin", MarginSettings)
class MembraneMargin(Defence[MarginSettings]):
    """The loss term eta * weighted mean of max(0, 1 - |V| / (width sigma)), which moves potentials from the threshold.

    Potentials above the threshold are moved up, those below it down. sigma is the deviation in the batch per channel
    and step, and has a gradient, so that scaling all V does not change the term.
    """

    def read(self, trace: Trace) -> Any:
        """Return a layer's currents, and max(0, 1 - |V| / (width sigma)), both [T, B, C, ...]."""
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
    """eta: weight of the term."""

    eta: NonNegative = 4.0


@register("salient-reach", SalientSettings)
class SalientReach(Defence[SalientSettings]):
    """MPD-SGR with the window `reach`, whose steps and channels are weighted by their currents' effect on the margin.

    The flips that change the margin most thus count most. The weights have no gradient.
    """

    def check(self, recipe: Recipe) -> None:
        if "at" not in recipe.defence:
            raise InputError("salient-reach needs an attack in training; add [defence.at]")

    def read(self, trace: Trace) -> Any:
        """Return a layer's currents [T, B, C, ...], and the reading of MPD-SGR's window `reach`."""
        return currents_of(trace), ReachReading(trace.layer, empirical_moments(trace), potentials(trace))

    def term(self, step: Step) -> Term:
        currents, readings = zip(*step.readings, strict=True)
        weights = [w.mean((1, *range(3, w.dim()))) for w in saliency(step, currents)]
        return Term("salient_omega", self.settings.eta, weighted(reach_overlaps(step, readings), weights))


def empirical_moments(trace: Trace) -> Moments:
    """Return mean and deviation [T, C] of a layer's potentials in the batch, which exist for every layer."""
    moments = layer_moments(trace, ESTIMATORS["empirical"])
    assert moments is not None
    return moments


def currents_of(trace: Trace) -> Tensor:
    """Return a layer's currents [T, B, C, ...]. Raises InputError if the GPU kernel did not store them."""
    if trace.current is None:
        raise InputError("this variant reads the input currents, which the GPU kernel does not store; train on a CPU")
    return trace.current


def saliency(step: Step, currents: Sequence[Tensor]) -> list[Tensor]:
    """Return the absolute surrogate gradient of the margin in each of `currents`, of their shape, detached."""
    rival = best_wrong(step.logits, step.y)
    margin = (step.logits.gather(1, step.y[:, None]) - step.logits.gather(1, rival[:, None])).sum()
    return [g.abs().float() for g in torch.autograd.grad(margin, currents, retain_graph=True)]


def weighted(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the mean over layers of each layer's weighted mean. values, weights: tensors of equal shape, by layer."""
    means = [(w * x).sum() / w.sum().clamp(min=1e-12) for w, x in zip(weights, values, strict=True)]
    return torch.stack(means).mean()
