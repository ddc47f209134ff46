"""The frame every architecture shares: normalise, encode over time, spiking layers, a linear readout over time."""

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
    """(x - mean) / std per channel. Part of the model, so that attacks and users meet pixels in [0, 1]."""

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
    """The last linear layer y_t = W s_t + b, whose outputs over T steps add up with `over_time` [T].

    Spikes [T, B, F] to logits [B, K].
    """

    over_time: Tensor

    def __init__(self, over_time: Tensor, fan_in: int, classes: int) -> None:
        super().__init__(fan_in, classes)
        self.register_buffer("over_time", over_time, persistent=False)

    def forward(self, steps: Tensor) -> Tensor:
        outputs = fold_time(super().forward, steps)
        return (self.over_time[:, None, None] * outputs).sum(0)  # this product stays in float32 under autocast


class SpikingNet(nn.Module):
    """Images [B, C, H, W] in [0, 1] to logits [B, K].

    `body` holds temporal modules, whose neurons can be observed, and stateless ones, which see time folded into the
    batch. `recompute`: the backward pass computes each layer again instead of keeping what it needs of it.
    """

    recompute: bool = False

    def __init__(self, shape: Shape, *, encode: Encoding, body: Iterable[nn.Module], readout: Readout) -> None:
        super().__init__()
        self.normalize, self.encode, self.T = Normalize(shape[0]), encode, encode.T
        self.body, self.readout = nn.ModuleList(body), readout

    def forward(self, x: Tensor, observe: Observer | None = None, noise: Noise | list[Tensor] = None) -> Tensor:
        """Return logits [B, K] of images x [B, C, H, W] in [0, 1].

        noise: the source that stochastic encodings and neurons draw from, or the draws [B, steps, ...] of this pass in
        order; deterministic networks ignore it.
        """
        noise = in_turn(noise) if isinstance(noise, list) else noise
        steps = self.encode(x, self.normalize, noise)  # [T, B, C, H, W]
        steps = one_by_one(self.body, steps, observe, noise, recompute=self.recompute)
        logits: Tensor = self.readout(steps)
        return logits

    def layers(self) -> list[SpikingLayer]:
        """All layers of neurons, in the order of the forward pass."""
        return [module for module in self.modules() if isinstance(module, SpikingLayer)]

    @property
    def plain(self) -> bool:
        """Whether all neurons are plain `LIF` neurons, none of them replaced by a defence."""
        return all(type(layer.neuron) is LIF for layer in self.layers())

    @property
    def stochastic(self) -> bool:
        """Whether two forward passes of the same image differ."""
        return self.encode.stochastic or any(layer.neuron.stochastic for layer in self.layers())


Builder = Callable[[Recipe, Shape, int], SpikingNet]
MODELS: Registry[Builder] = Registry("model", "mpdsgr_deploy.models")
register = MODELS.register  # `builder(recipe, image shape, number of classes)` becomes available to recipes by name


def build_model(recipe: Recipe, shape: Shape, classes: int) -> SpikingNet:
    """Build the untrained model that a recipe names; weights come from torch's global generator.

    Raises InputError for an unknown model, surrogate or encoding, or an image size the model cannot take.
    """
    return MODELS.choose(recipe.model.name)(recipe, shape, classes)


def scaled(channels: int, recipe: Recipe) -> int:
    """Return a layer's width at the recipe's width factor, at least 1."""
    return max(1, round(channels * recipe.model.width))


def make_readout(recipe: Recipe, fan_in: int, classes: int) -> Readout:
    """Build the readout that a recipe names.

    mean       the outputs' mean
    membrane   the potential of a leaky integrator without threshold after T steps: sum of tau^(T-t) y_t
    """
    return Readout(readout_weights(recipe), fan_in, classes)


def readout_weights(recipe: Recipe) -> Tensor:
    """Return the weight of each step's output in a recipe's readout, [T]."""
    T, tau = recipe.encoding.T, recipe.neuron.tau
    mean = recipe.model.readout == "mean"
    return torch.tensor([1 / T if mean else tau ** (T - t) for t in range(1, T + 1)])


def make_neuron(recipe: Recipe) -> LIF:
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
    """Build the normalisation of a convolution's output that a recipe names."""
    match recipe.model.norm:
        case "tdbn":
            return TdBN(channels, v_threshold=recipe.neuron.v_threshold)
        case "bn":
            return nn.BatchNorm2d(channels)
        case "none":
            return None


def frequency_radii(config: EncodingSection, shape: Shape) -> tuple[int, ...]:
    """Return the radius of each step's low-pass: those of the recipe, or evenly from half the image's side down."""
    half, T = max(shape[1:]) // 2, config.T
    return config.radii or tuple(max(1, round(half * (T - t) / T)) for t in range(T))


def make_encoding(recipe: Recipe, shape: Shape) -> Encoding:
    """Build the encoding that a recipe names for images of `shape`. Raises InputError if it does not fit them."""
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
