"""MPD-SGR (arXiv 2511.12199): loss + eta * Omega, the overlap of membrane potentials and surrogate window."""

from mpdsgr_deploy.defences.base import Defence, Step, Term, register
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.mpd import ESTIMATORS, MEASURES, layer_mean
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import NonNegative, Section


class Settings(Section):
    """Which estimator of the potentials' moments (see `mpdsgr_deploy.mpd`), and the weight eta."""

    estimator: str = "theorem"
    measure: str = "overlap"
    eta: NonNegative = 0.5  # unknown in print; sweep 0.1 .. 10


@register("mpd-sgr", Settings)
class MPDSGR(Defence[Settings]):
    """eta * Omega, taken on the images the step trains on."""

    def check(self, recipe: Recipe) -> None:
        choose("estimator", ESTIMATORS, self.settings.estimator)
        choose("measure", MEASURES, self.settings.measure)
        if self.settings.estimator == "theorem" and recipe.model.norm != "tdbn":
            raise InputError(
                f"the theorem estimator needs tdBN and model.norm is {recipe.model.norm!r}; "
                f"set defence.mpd-sgr.estimator = 'empirical'"
            )

    def term(self, step: Step) -> Term:
        config = self.settings
        value = layer_mean(step.traces, ESTIMATORS[config.estimator], MEASURES[config.measure])
        return Term("omega", config.eta, value)
