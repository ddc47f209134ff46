"""Spiking architectures by name. Each model registers itself with `@register("name")` in its own file."""

from mpdsgr_deploy.models import vgg, wrn  # noqa: F401  (register their models)
from mpdsgr_deploy.models.spiking_net import MODELS, Readout, SpikingNet, build_model, register

__all__ = ["MODELS", "Readout", "SpikingNet", "build_model", "register"]
