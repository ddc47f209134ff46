"""The frame every architecture shares: normalise, encode over time, spiking layers, mean of a linear readout."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import ENCODINGS, LIF, SURROGATES, Observer, SpikingLayer, fold_time

Shape = tuple[int, int, int]  # channels, height, width of one image


class Normalize(nn.Module):
    """(x - mean) / std per channel. Part of the model, so that attacks and users meet pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def set(self, mean: Iterable[float], std: Iterable[float]) -> None:
        """Take the statistics [C] of the training images."""
        self.mean.copy_(torch.as_tensor(list(mean)).view_as(self.mean))
        self.std.copy_(torch.as_tensor(list(std)).view_as(self.std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class SpikingNet(nn.Module):
    """Images [B, C, H, W] in [0, 1] to logits [B, K]: the mean over T steps of the linear `readout`.

    `body` holds spiking layers, which can be observed, and stateless modules, which see time folded into the batch.
    """

    def __init__(
        self,
        *,
        channels: int,
        encode: Callable[[Tensor, int], Tensor],
        T: int,
        body: Iterable[nn.Module],
        readout: nn.Module,
    ) -> None:
        super().__init__()
        self.normalize, self.encode, self.T = Normalize(channels), encode, T
        self.body, self.readout = nn.ModuleList(body), readout

    def forward(self, x: Tensor, observe: Observer | None = None) -> Tensor:
        spikes = self.encode(self.normalize(x), self.T)  # [T, B, C, H, W]
        for layer in self.body:
            spikes = layer(spikes, observe) if isinstance(layer, SpikingLayer) else fold_time(layer, spikes)
        return fold_time(self.readout, spikes).mean(0)  # [B, K]


Builder = Callable[[Recipe, Shape, int], SpikingNet]
MODELS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make `builder(recipe, image shape, number of classes)` available to recipes under `name`."""

    def add(builder: Builder) -> Builder:
        MODELS[name] = builder
        return builder

    return add


def build_model(recipe: Recipe, shape: Shape, classes: int) -> SpikingNet:
    """The untrained model a recipe names; weights come from torch's global generator.

    Raises InputError for an unknown model, surrogate or encoding, or an image size the model cannot take.
    """
    return choose("model", MODELS, recipe.model.name)(recipe, shape, classes)


def make_neuron(recipe: Recipe) -> LIF:
    """The neuron a recipe describes."""
    config = recipe.neuron
    surrogate = choose("surrogate", SURROGATES, config.surrogate)
    shape = () if config.surrogate_parameter is None else (config.surrogate_parameter,)
    return LIF(tau=config.tau, v_threshold=config.v_threshold, reset=config.reset, surrogate=surrogate(*shape))


def make_encoding(recipe: Recipe) -> Callable[[Tensor, int], Tensor]:
    """The encoding a recipe names."""
    return choose("encoding", ENCODINGS, recipe.encoding.name)
