"""What needs torch: a model and a defence."""

from torch import nn

from mpdsgr_deploy.defences import Defence, Step, Term
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.spiking_net import Shape, make_encoding, make_neuron, make_readout
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import Positive, Section
from mpdsgr_deploy.snn import SpikingLayer


def mlp(recipe: Recipe, shape: Shape, classes: int) -> SpikingNet:
    """One hidden layer of 24 spiking neurons."""
    encode = make_encoding(recipe, shape)
    pixels = encode.channels * shape[1] * shape[2]
    body = [nn.Flatten(), SpikingLayer("hidden", nn.Linear(pixels, 24), None, make_neuron(recipe))]
    return SpikingNet(shape, encode=encode, body=body, readout=make_readout(recipe, 24, classes))


class CalmSettings(Section):
    """The weight of the mean squared logit."""

    weight: Positive = 0.01


class Calm(Defence[CalmSettings]):
    """Draws the logits towards zero."""

    Settings = CalmSettings

    def term(self, step: Step) -> Term:
        return Term("energy", self.settings.weight, step.logits.square().mean())
