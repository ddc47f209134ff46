"""The frame of every architecture: normalisation, encoding over time, spiking layers, and a linear readout."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.recipe import EncodingSection, Recipe
from mpdsgr_deploy.registry import Registry
from mpdsgr_deploy.snn import LIF, Encoding, Noise, Observer, SpikingLayer, TdBN, fold_time, make_surrogate
from mpdsgr_deploy.snn.draws import in_turn
from mpdsgr_deploy.snn.encoding import Direct, Frames, Frequency, Poisson, RandomizedSmoothing, StochasticQuantization
from mpdsgr_deploy.snn.recompute import one_by_one
from mpdsgr_deploy.surrogates import KINDS

Shape = tuple[int, int, int]  # channels, height, width of one image


class Normalize(nn.Module):
    """(x - mean) / std per channel, for x [..., C, H, W]; the identity until `set` is called.

    It is part of the model, so that users and attacks work on pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def set(self, mean: Iterable[float], std: Iterable[float]) -> None:
        """Store the statistics [C] of the training images."""
        self.mean.copy_(torch.as_tensor(list(mean)).view_as(self.mean))
        self.std.copy_(torch.as_tensor(list(std)).view_as(self.std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Readout(nn.Linear):
    """The last linear layer, from spikes s [T, B, F] to logits [B, K]: sum_t a_t (W s_t + b).

    over_time: the weights a [T].
    """

    over_time: Tensor

    def __init__(self, over_time: Tensor, fan_in: int, classes: int) -> None:
        super().__init__(fan_in, classes)
        self.register_buffer("over_time", over_time, persistent=False)

    def forward(self, steps: Tensor) -> Tensor:
        outputs = fold_time(super().forward, steps)
        return (self.over_time[:, None, None] * outputs).sum(0)  # this product stays in float32 under autocast


class SpikingNet(nn.Module):
    """A spiking network, from images [B, C, H, W] in [0, 1] to logits [B, K].

    `body` holds temporal modules, whose neurons can be observed, and stateless modules, which see time folded into the
    batch. `recompute`: the backward pass computes each layer again instead of storing its intermediate values.
    """

    recompute: bool = False

    def __init__(self, shape: Shape, *, encode: Encoding, body: Iterable[nn.Module], readout: Readout) -> None:
        super().__init__()
        self.normalize, self.encode, self.T = Normalize(shape[0]), encode, encode.T
        self.body, self.readout = nn.ModuleList(body), readout

    def forward(self, x: Tensor, observe: Observer | None = None, noise: Noise | list[Tensor] = None) -> Tensor:
        """Return logits [B, K] of images x [B, C, H, W] in [0, 1].

        observe: is called with the `Trace` of each spiking layer. noise: the source from which stochastic encodings and
        neurons draw, or the draws [B, steps, ...] of this pass in order; deterministic networks ignore it.
        """
        noise = in_turn(noise) if isinstance(noise, list) else noise
        steps = self.encode(x, self.normalize, noise)  # [T, B, C, H, W]
        steps = one_by_one(self.body, steps, observe, noise, recompute=self.recompute)
        logits: Tensor = self.readout(steps)
        return logits

    def layers(self) -> list[SpikingLayer]:
        """Return all layers of neurons, in the order of the forward pass."""
        return [module for module in self.modules() if isinstance(module, SpikingLayer)]

    @property
    def plain(self) -> bool:
        """Whether all neurons are plain `LIF` neurons, none of them replaced by a defence."""
        return all(type(layer.neuron) is LIF for layer in self.layers())

    @property
    def stochastic(self) -> bool:
        """Whether the encoding or the neurons draw noise, so that two passes of the same image may differ."""
        return self.encode.stochastic or any(layer.neuron.stochastic for layer in self.layers())


Builder = Callable[[Recipe, Shape, int], SpikingNet]
MODELS: Registry[Builder] = Registry("model", "mpdsgr_deploy.models")
register = MODELS.register  # `builder(recipe, image shape, number of classes)` becomes available to recipes by name


def build_model(recipe: Recipe, shape: Shape, classes: int) -> SpikingNet:
    """Build the untrained model that a recipe names, with weights from torch's global generator.

    Raises InputError for an unknown model, surrogate or encoding, and for images that the model or encoding cannot
    take.
    """
    return MODELS.choose(recipe.model.name)(recipe, shape, classes)


def scaled(channels: int, recipe: Recipe) -> int:
    """Return the width of a layer of `channels`, multiplied by the recipe's `model.width` and rounded, at least 1."""
    return max(1, round(channels * recipe.model.width))


def make_readout(recipe: Recipe, fan_in: int, classes: int) -> Readout:
    """Build the readout of outputs y_1, ..., y_T that a recipe names.

    mean       their mean
    membrane   the potential of a leaky integrator without threshold after T steps: sum_t tau^(T-t) y_t
    """
    return Readout(readout_weights(recipe), fan_in, classes)


def readout_weights(recipe: Recipe) -> Tensor:
    """Return the weight of each step's output in a recipe's readout, float32 [T]; see `make_readout`."""
    T, tau = recipe.encoding.T, recipe.neuron.tau
    mean = recipe.model.readout == "mean"
    return torch.tensor([1 / T if mean else tau ** (T - t) for t in range(1, T + 1)])


def make_neuron(recipe: Recipe) -> LIF:
    """Build the LIF neuron that a recipe names. Raises InputError for a surrogate that training cannot use."""
    config = recipe.neuron
    KINDS.choose(config.surrogate)  # only the kind, without a width, and none that exists only for attacks
    surrogate = make_surrogate(config.surrogate, config.surrogate_parameter)
    return LIF(
        tau=config.tau,
        v_threshold=config.v_threshold,
        reset=config.reset,
        surrogate=surrogate,
        detach_reset=config.detach_reset,
    )


def make_norm(recipe: Recipe, channels: int) -> nn.Module | None:
    """Build the normalisation of `channels` feature maps that a recipe names; None if it names none."""
    match recipe.model.norm:
        case "tdbn":
            return TdBN(channels, v_threshold=recipe.neuron.v_threshold)
        case "bn":
            return nn.BatchNorm2d(channels)
        case "none":
            return None


def frequency_radii(config: EncodingSection, shape: Shape) -> tuple[int, ...]:
    """Return the radius of each step's low-pass filter: the recipe's, or T radii that fall evenly from half the side.

    The side is the longer of the image's height and width.
    """
    half, T = max(shape[1:]) // 2, config.T
    return config.radii or tuple(max(1, round(half * (T - t) / T)) for t in range(T))


def make_encoding(recipe: Recipe, shape: Shape) -> Encoding:
    """Build the encoding that a recipe names for images of `shape`.

    Raises InputError if there is no such encoding, or if it does not fit the images or T.
    """
    channels, height, width = shape
    config = recipe.encoding
    T = config.T

    def frequency() -> Encoding:
        radii = frequency_radii(config, shape)
        if len(radii) != T:
            raise InputError(
                f"encoding.radii has {len(radii)} values and encoding.T is {T}; give one radius per time step"
            )
        return Frequency(channels, (height, width), radii)

    def frames() -> Encoding:
        if channels % T:
            raise InputError(
                f"encoding 'frames' splits the {channels} channels of an image into T frames; set encoding.T to a "
                f"divisor of {channels}, not {T}"
            )
        return Frames(T, channels // T)

    encodings: dict[str, Callable[[], Encoding]] = {
        "direct": lambda: Direct(T, channels),
        "poisson": lambda: Poisson(T, channels),
        "sqe": lambda: StochasticQuantization(T, channels, config.levels),
        "rsc": lambda: RandomizedSmoothing(T, channels, config.std),
        "frequency": frequency,
        "frames": frames,
    }
    return choose("encoding", encodings, config.name)()
