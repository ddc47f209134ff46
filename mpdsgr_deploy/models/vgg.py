"""Spiking VGGs: blocks of 3x3 convolution, tdBN and LIF neurons, average pooling, and a fully connected head."""

from collections.abc import Sequence

from torch import nn

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models.spiking_net import (
    Shape,
    SpikingNet,
    make_encoding,
    make_neuron,
    make_norm,
    make_readout,
    register,
    scaled,
)
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import SpikingLayer

P = "P"  # the entry of a plan that stands for AvgPool2d(2)
VGG11_PLAN = (64, P, 128, 256, P, 512, 512, 512, P, 512, 512)
VGG16_PLAN = (64, 64, P, 128, 128, P, 256, 256, 256, P, 512, 512, 512, P, 512, 512, 512, P)


def vgg(recipe: Recipe, shape: Shape, classes: int, *, plan: Sequence[int | str], hidden: Sequence[int]) -> SpikingNet:
    """Build a VGG for images of `shape`.

    plan: the channels of each convolution; P halves height and width. hidden: the widths of the fully connected spiking
    layers, which have a bias and no tdBN, as in the SNN-RAT family of code bases. `model.width` of the recipe
    multiplies every width. Raises InputError if the image is too small to be halved so often.
    """
    _, height, width = shape
    encode = make_encoding(recipe, shape)
    pools = sum(item == P for item in plan)
    if min(height, width) < 2**pools:
        raise InputError(
            f"model {recipe.model.name!r} halves its input {pools} times and so needs at least {2**pools}x{2**pools} "
            f"pixels; the images are {height}x{width}"
        )
    body: list[nn.Module] = []
    fan_in = encode.channels
    for item in plan:
        if isinstance(item, str):
            body.append(nn.AvgPool2d(2))
            continue
        fan_out = scaled(item, recipe)
        norm = make_norm(recipe, fan_out)
        body.append(
            SpikingLayer(
                f"conv{sum(isinstance(m, SpikingLayer) for m in body) + 1}",
                nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=norm is None),
                norm,
                make_neuron(recipe),
            )
        )
        fan_in = fan_out
    body.append(nn.Flatten())
    fan_in *= (height >> pools) * (width >> pools)
    for number, item in enumerate(hidden, 1):
        fan_out = scaled(item, recipe)
        body.append(SpikingLayer(f"fc{number}", nn.Linear(fan_in, fan_out), None, make_neuron(recipe)))
        fan_in = fan_out
    return SpikingNet(shape, encode=encode, body=body, readout=make_readout(recipe, fan_in, classes))


@register("vgg11")
def vgg11(recipe: Recipe, shape: Shape, classes: int) -> SpikingNet:
    """VGG11 of the SNN-RAT family: 8 convolutions and 2 hidden layers of 4096; 61.4 M parameters at 32x32, K = 10."""
    return vgg(recipe, shape, classes, plan=VGG11_PLAN, hidden=(4096, 4096))


@register("vgg11-slim")
def vgg11_slim(recipe: Recipe, shape: Shape, classes: int) -> SpikingNet:
    """VGG11's convolutions, a fourth pooling and a linear readout: 11.0 M parameters at 32x32, K = 10."""
    return vgg(recipe, shape, classes, plan=(*VGG11_PLAN, P), hidden=())


@register("vgg16")
def vgg16(recipe: Recipe, shape: Shape, classes: int) -> SpikingNet:
    """VGG16 of the SNN-RAT family: 13 convolutions and 2 hidden layers of 4096; images of at least 32x32."""
    return vgg(recipe, shape, classes, plan=VGG16_PLAN, hidden=(4096, 4096))


@register("vgg-small")
def vgg_small(recipe: Recipe, shape: Shape, classes: int) -> SpikingNet:
    """A small VGG for 8x8 to 64x64 images: poolings down to a side of at most 4, and a linear readout.

    The first convolution has 32 channels; each pooling doubles them, up to 128.
    """
    plan: list[int | str] = [32]
    channels, size = 32, min(shape[1:])
    while size > 4:
        channels, size = min(2 * channels, 128), size // 2
        plan += [P, channels]
    return vgg(recipe, shape, classes, plan=[*plan, channels], hidden=())
