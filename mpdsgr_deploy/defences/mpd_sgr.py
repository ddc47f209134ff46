"""MPD-SGR (arXiv 2511.12199): add eta * Omega to the loss, the overlap of membrane potentials and surrogate window."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator
from torch import Tensor

from mpdsgr_deploy.defences.base import DEFENCES, Defence, Step, Term, register
from mpdsgr_deploy.defences.eta import accuracies, next_eta, reference_accuracies, step_to_omega, step_within_drop
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.mpd import ESTIMATORS, MEASURES, Moments, layer_moments, layer_value, mean_of_layers, reach
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import NonNegative, Number, Section
from mpdsgr_deploy.snn import Trace
from mpdsgr_deploy.snn.expected_surrogate import interval_mass

Share = Annotated[Number, Field(gt=0, lt=1)]


class MPDSGRSettings(Section):
    """The estimator of the potentials' moments, the measure of these (both in `mpdsgr_deploy.mpd`), and the weight eta.

    window: the window of the overlap. "surrogate": the surrogate's, as in the paper; "reach": as wide as the training
    attack moves the potentials, which penalises spikes that the attack can flip, and needs [defence.at].

    With a budget, `target_omega` or `max_drop`, eta is only the value of the first epoch; see
    `mpdsgr_deploy.defences.eta`.
    """

    estimator: str = "theorem"
    measure: str = "overlap"
    window: Literal["surrogate", "reach"] = "surrogate"
    eta: NonNegative = 0.5  # the paper does not state it; try 0.1 to 10, or set a budget
    target_omega: Share | None = None  # target of the chosen measure, as a mean over an epoch's training images
    max_drop: Share | None = None  # largest drop of clean validation accuracy below the reference at the same epoch
    reference: str | None = None  # directory of a run trained without the regulariser

    @model_validator(mode="after")
    def _fit_together(self) -> "MPDSGRSettings":
        if (self.max_drop is None) != (self.reference is None):
            raise ValueError("max_drop and reference belong together; give both or neither")
        if self.target_omega is not None and self.max_drop is not None:
            raise ValueError("target_omega and max_drop are two budgets for one eta; give one of them")
        if self.eta == 0 and (self.target_omega or self.max_drop):
            raise ValueError("a budget multiplies eta after every epoch, so eta must start above 0")
        if self.window == "reach" and self.measure != "overlap":
            raise ValueError("window 'reach' works only with measure 'overlap'; leave out measure")
        return self


class ReachReading(NamedTuple):
    """The readings of a layer for the window "reach"; potentials: T tensors [B, C, ...]."""

    layer: str
    moments: Moments
    potentials: list[Tensor]


@register("mpd-sgr", MPDSGRSettings)
class MPDSGR(Defence[MPDSGRSettings]):
    """Add eta * Omega to the loss, measured on the images of the training step."""

    def __init__(self, settings: MPDSGRSettings) -> None:
        super().__init__(settings)
        self.eta = settings.eta
        self.reference: list[float] = []  # validation accuracy after each epoch

    def check(self, recipe: Recipe) -> None:
        choose("estimator", ESTIMATORS, self.settings.estimator)
        choose("measure", MEASURES, self.settings.measure)
        if self.settings.estimator == "theorem" and recipe.model.norm != "tdbn":
            raise InputError(
                f"the theorem estimator needs tdBN and model.norm is {recipe.model.norm!r}; "
                f"set defence.mpd-sgr.estimator = 'empirical'"
            )
        changing = [name for name in recipe.defence if not DEFENCES[name].time_invariant]
        if self.settings.estimator == "theorem" and changing:
            raise InputError(
                f"the theorem estimator needs neurons that are the same at every step, and {', '.join(changing)} "
                "changes them; set defence.mpd-sgr.estimator = 'empirical'"
            )
        if self.settings.window == "reach" and "at" not in recipe.defence:
            raise InputError(
                "the window 'reach' follows from the attack in training, and this recipe has none; add "
                "[defence.at] or set defence.mpd-sgr.window = 'surrogate'"
            )
        self.recipe = recipe

    def begin_epoch(self, history: list[dict[str, Any]]) -> None:
        config = self.settings
        if config.reference is not None and not self.reference:
            # read here and not in `check`, because a trained network must also be rebuilt without its reference
            self.reference = reference_accuracies(config.reference, self.recipe)
        if not history:
            return
        if config.target_omega is not None:
            step = step_to_omega([entry["omega"] for entry in history], config.target_omega)
        elif config.max_drop is not None:
            drops = [theirs - ours for theirs, ours in zip(self.reference, accuracies(history), strict=False)]
            step = step_within_drop(drops, config.max_drop)
        else:
            return
        self.eta = next_eta(history[-1]["omega_weight"], step)

    def read(self, trace: Trace) -> Any:
        estimator = ESTIMATORS[self.settings.estimator]
        if self.settings.window == "surrogate":
            return layer_value(trace, estimator, MEASURES[self.settings.measure])
        moments = layer_moments(trace, estimator)
        return None if moments is None else ReachReading(trace.layer, moments, potentials(trace))

    def term(self, step: Step) -> Term:
        if self.settings.window == "surrogate":
            return Term("omega", self.eta, mean_of_layers(step.readings))
        return Term("omega", self.eta, mean_of_layers([mass.mean() for mass in reach_overlaps(step, step.readings)]))


def reach_overlaps(step: Step, readings: Sequence[ReachReading]) -> list[Tensor]:
    """Return each layer's overlap [T, C] with a window as wide as the training attack moves its potentials."""
    clean: dict[str, list[Tensor]] = {}
    step.forward(step.clean, lambda trace: clean.update({trace.layer: potentials(trace)}))
    return [interval_mass(*own.moments, reach(own.potentials, clean[own.layer])) for own in readings]


def potentials(trace: Trace) -> list[Tensor]:
    """Return the membrane potentials of a layer, T tensors [B, C, ...]."""
    return [u for u, _ in trace.states]
